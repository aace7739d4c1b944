"""Rules as plain values: what YAML files and checkpoints hold."""

import json
from typing import Any

import pytest
import yaml

from tnlayers import CP, MPS, TT, MacsKept, ParamsKept, RelativeError, Rule, Tucker, rules_from_plain

RULES = [
    Rule("conv1", None, "small"),
    Rule("*", Tucker(MacsKept(1 / 3)), "a third"),
    Rule("*", Tucker((4, 3)), plan=(("input",), ("core", "output"))),
    Rule("a.b", CP(7), plan="dense"),
    Rule("a.?", MPS((2, 3, 4))),
    Rule("fc*", TT(ParamsKept(0.1), in_shape=(4, 8), out_shape=(2, 5))),
    Rule("fc*", TT(RelativeError(0.25))),
]


@pytest.mark.parametrize("rule", RULES, ids=str)
def test_plain_values_and_back(rule: Rule) -> None:
    plain = rule.to_plain()
    assert json.loads(json.dumps(plain)) == yaml.safe_load(yaml.safe_dump(plain)) == plain
    assert rules_from_plain([plain]) == [rule]


def test_method_names_may_be_written_in_lower_case() -> None:
    assert Rule.from_plain({"pattern": "*", "method": "tucker", "rank": " MacsKept( 0.5 )"}) == Rule(
        "*", Tucker(MacsKept(0.5))
    )


@pytest.mark.parametrize(
    ("plain", "message"),
    [
        ({"pattern": "a", "method": "tuker", "rank": 2}, r"method 'tuker' is not known; .*did you mean 'Tucker'\?"),
        (
            {"pattern": "a", "method": "Tucker", "rnk": 2},
            r"option 'rnk' is not known for method Tucker.*did you mean 'rank'\?",
        ),
        ({"pattern": "a", "method": "dense", "rank": 2}, "option 'rank' is not known for method dense"),
        ({"pattern": "a", "method": "Tucker"}, "method Tucker needs a 'rank'"),
        ({"method": "Tucker", "rank": 2}, "has no 'pattern'"),
        ({"pattern": "a", "rank": 2}, "has no 'method'"),
        ({"pattern": "a", "method": "Tucker", "rank": 0.5}, "rank 0.5 is a bare float"),
        ({"pattern": "a", "method": "Tucker", "rank": 0}, "every rank must be at least 1"),
        ({"pattern": "a", "method": "Tucker", "rank": "MacsKpt(0.5)"}, "is not understood; expected an int"),
        ({"pattern": "a", "method": "Tucker", "rank": "MacsKept(half)"}, "'half' is not a number"),
        (
            {"pattern": "a", "method": "Tucker", "rank": "MacsKept(2)"},
            r"MacsKept\(2.0\): expected a number above 0 and at most 1",
        ),
        ({"pattern": "a", "method": "os.system", "rank": 2}, "method 'os.system' is not known"),
        ("conv1", "is not a mapping"),
        ({"pattern": None, "method": "dense"}, "pattern None is not a string"),
        ({"pattern": "a", "method": "Tucker", "rank": 2, "plan": "dens"}, "plan 'dens': expected 'auto'"),
        ({"pattern": "a", "method": "Tucker", "rank": 2, "plan": 5}, "plan 5: expected 'auto'"),
        (
            {"pattern": "a", "method": "TT", "rank": 2, "in_shape": 784},
            "in_shape 784: expected a tuple of at most 10 positive ints",
        ),
        (
            {"pattern": "a", "method": "TT", "rank": 2, "in_shape": [2.0, 392]},
            r"in_shape \[2.0, 392\]: expected a tuple",
        ),
    ],
    ids=str,
)
def test_errors_name_the_rule_the_value_and_the_fix(plain: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        rules_from_plain([{"pattern": "ok", "method": "dense"}, plain])
    assert str(error.value).startswith("rules[1] (pattern ")
