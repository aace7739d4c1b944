"""Opening and closing the modules of a model."""


def _exchanged(value: Any, replacements: Mapping[nn.Module, nn.Module]) -> Any:
    """Returns a copy of a plain list, tuple or dict that holds modules that are replaced, with others in their places."""
    if type(value) not in (list, tuple, dict):
        return value
    items = value.values() if isinstance(value, dict) else value
    if not any(isinstance(item, nn.Module) and item in replacements for item in items):
        return value
    made = [replacements.get(item, item) if isinstance(item, nn.Module) else item for item in items]
    return dict(zip(value, made, strict=True)) if isinstance(value, dict) else type(value)(made)


def replace_layers(model: Model, replacements: Mapping[nn.Module, nn.Module]) -> Model:
    """Replaces a module in every place where it is used, so that a shared one stays shared.

    These places are also the plain lists, tuples and dicts of modules, such as a list that a forward goes through.
    """
    if model in replacements:
        return replacements[model]  # type: ignore[return-value]
    for parent in list(model.modules()):
        for name, child in list(parent._modules.items()):
            if child is not None and child in replacements:
                parent._modules[name] = replacements[child]
        for name, value in list(vars(parent).items()):
            vars(parent)[name] = _exchanged(value, replacements)
    choose_fast_paths(model)
    return model
