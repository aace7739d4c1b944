"""What an error says, and what it is about."""

import pickle

import pytest

from tnlayers import CheckpointError, UserError
from tnlayers.errors import about, as_checkpoint_error, message


@pytest.mark.parametrize("kind", [UserError, CheckpointError])
def test_an_error_of_the_user_names_what_it_is_about_in_its_one_line(kind: type[UserError]) -> None:
    with pytest.raises(kind) as raised, about("rule 'conv*'"), about("conv1"):
        raise kind("rank 0: every rank\nmust be at least 1")
    assert str(raised.value) == "rule 'conv*': conv1: rank 0: every rank\nmust be at least 1"
    assert message(raised.value) == "rule 'conv*': conv1: rank 0: every rank must be at least 1"
    assert str(pickle.loads(pickle.dumps(raised.value))) == str(raised.value)


def test_any_other_error_keeps_its_own_words_and_names_what_it_is_about_beside_them() -> None:
    with pytest.raises(ZeroDivisionError) as raised, about("rule 'conv*'"), about("conv1"):
        raise ZeroDivisionError
    assert raised.value.__notes__ == ["conv1", "rule 'conv*'"]
    assert message(raised.value) == "rule 'conv*': conv1: ZeroDivisionError"


def test_what_a_file_makes_an_error_say_is_bounded() -> None:
    with pytest.raises(CheckpointError) as raised, as_checkpoint_error("net.ckpt"), about("layers[0]"):
        raise UserError("x" * 10**6)
    assert str(raised.value).startswith("net.ckpt: layers[0]: xxx")
    assert len(str(raised.value)) < 500
    assert isinstance(raised.value.__cause__, UserError)


@pytest.mark.parametrize("kind", [ValueError, TypeError, KeyError])
def test_a_bug_is_not_told_as_the_fault_of_a_file(kind: type[Exception]) -> None:
    with pytest.raises(kind) as raised, as_checkpoint_error("net.ckpt"), about("layers[0]"):
        raise kind("a bug")
    assert type(raised.value) is kind


@pytest.mark.parametrize("error", [UserError("rank 0"), ZeroDivisionError("rank 0")])
def test_notes_of_other_libraries_stay_notes(error: Exception) -> None:
    error.add_note("see the log")
    with pytest.raises(type(error)) as raised, about("conv1"):
        raise error
    assert message(raised.value) == "conv1: rank 0"
    assert "see the log" in raised.value.__notes__
