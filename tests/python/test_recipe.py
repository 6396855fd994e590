"""Recipes: what they choose, and that every mistake is named by its key."""

from __future__ import annotations

import pytest

from qmoe_core.errors import QmoeError
from qmoe_core.formats import INT_BITS, INT_GROUPS, IntFormat, TernaryFormat, parse_format
from qmoe_core.recipe import Recipe, Rule
from qmoe_core.roles import COMPRESSIBLE, ROLES

TOML = """
version = 1

[[rule]]
match = "model.layers.0.*"
format = "keep"

[[rule]]
match = "*.down_proj"
format = "int8"
group = 64
zero_point = false
scale_dtype = "bfloat16"
half_step = true

[[rule]]
format = "ternary"
levels = "symmetric"
method = "ternary-centroid"
options = { threshold = 0.9 }

[[rule]]
role = ["attention", "dense"]
format = "int4-g32"
method = "finequant"
"""


def write(tmp_path, text):
    path = tmp_path / "recipe.toml"
    path.write_text(text)
    return path


def test_the_first_matching_rule_decides(tmp_path):
    recipe = Recipe.from_toml(write(tmp_path, TOML))
    assert recipe.choose("model.layers.0.mlp.experts.down_proj", "expert") is None
    rule, spec = recipe.choose("model.layers.1.mlp.experts.down_proj", "expert")
    assert (rule, spec.method, spec.format) == (1, "rtn", IntFormat(8, 64, False, "bfloat16", True))
    rule, spec = recipe.choose("model.layers.1.mlp.experts.gate_up_proj", "expert")
    assert (rule, spec.format, spec.options) == (2, TernaryFormat("symmetric"), {"threshold": 0.9})
    rule, spec = recipe.choose("model.layers.0.self_attn.q_proj.weight", "attention")
    assert (rule, spec.method, spec.format) == (3, "finequant", IntFormat(4, 32))


def test_only_experts_compress_unless_a_role_is_named():
    recipe = Recipe.uniform("int4")
    assert [role for role in ROLES if recipe.choose("x", role) is not None] == ["expert"]
    everything = Recipe.uniform("int4", role=COMPRESSIBLE)
    assert [role for role in ROLES if everything.choose("x", role) is not None] == list(COMPRESSIBLE)


def test_uniform_defaults():
    assert Recipe.uniform().rules[0].spec.format == IntFormat(4, 128, True, "float16")
    assert Recipe.uniform("ternary").rules[0].spec.method == "ternary-centroid"
    assert Recipe.uniform("int3", method="moqe").rules[0].spec.format == IntFormat(3, 0, False)
    assert Recipe.uniform(IntFormat(2, 64)).rules[0].spec.format == IntFormat(2, 64)


@pytest.mark.parametrize(
    "recipe",
    [
        Recipe.uniform(),
        Recipe.uniform("ternary", levels="symmetric", options={"threshold": 1}),
        Recipe.uniform("int3", method="moqe"),
        Recipe.uniform("int2", 16, half_step=True),
        Recipe.uniform("int2-g64-sym-half"),
    ],
)
def test_dictionaries_and_toml_read_back(tmp_path, recipe):
    assert Recipe.from_dict(recipe.to_dict()) == recipe
    assert Recipe.from_toml(write(tmp_path, recipe.to_toml())) == recipe


def test_a_long_recipe_and_strange_globs_read_back(tmp_path):
    recipe = Recipe.from_toml(write(tmp_path, TOML))
    odd = Recipe((Rule.make(format="keep", match='a"b\\c\n[!0-9]*é'), *recipe.rules))
    assert Recipe.from_toml(write(tmp_path, odd.to_toml())) == odd


@pytest.mark.parametrize(
    ("text", "code", "key"),
    [
        ("version = 2\n[[rule]]\nformat='int4'", "E_VERSION", "version"),
        ("version = true\n[[rule]]\nformat='int4'", "E_VERSION", "version"),
        ("rules = []", "E_UNKNOWN", "did you mean 'rule'"),
        ("version = 1", "E_VALUE", "rule"),
        ("rule = 3", "E_VALUE", "rule"),
        ("rule = [3]", "E_VALUE", r"rule\[0\]"),
        ("[[rule]]\nmatch='*'", "E_VALUE", r"rule\[0\].format"),
        ("[[rule]]\nformat='int4'\n[[rule]]\nformat='int5'", "E_VALUE", r"rule\[1\].format"),
        ("[[rule]]\nformat='float4'", "E_UNKNOWN", r"rule\[0\].format"),
        ("[[rule]]\nformat='int4'\ngroup=100", "E_VALUE", "group"),
        ("[[rule]]\nformat='int4'\ngroup='128'", "E_VALUE", r"rule\[0\].group"),
        ("[[rule]]\nformat='int4'\ngroup=true", "E_VALUE", r"rule\[0\].group"),
        ("[[rule]]\nformat='int4'\nzero_point=1", "E_VALUE", r"rule\[0\].zero_point"),
        ("[[rule]]\nformat='int4'\nhalf_step=1", "E_VALUE", r"rule\[0\].half_step"),
        ("[[rule]]\nformat='ternary'\nhalf_step=true", "E_VALUE", r"rule\[0\].half_step"),
        ("[[rule]]\nformat='keep'\nhalf_step=false", "E_VALUE", r"rule\[0\].half_step"),
        ("[[rule]]\nformat='int4'\nlevels='pair'", "E_VALUE", r"rule\[0\].levels"),
        ("[[rule]]\nformat='ternary'\ngroup=64", "E_VALUE", r"rule\[0\].group"),
        ("[[rule]]\nformat='ternary'\nlevels='three'", "E_VALUE", "levels"),
        ("[[rule]]\nformat='keep'\ngroup=64", "E_VALUE", r"rule\[0\].group"),
        ("[[rule]]\nformat='keep'\nmethod='rtn'", "E_VALUE", r"rule\[0\].method"),
        ("[[rule]]\nformat='int4'\nmethod='rtm'", "E_UNKNOWN", "did you mean 'rtn'"),
        ("[[rule]]\nformat='int4'\nmethod='ternary-minmax'", "E_VALUE", r"rule\[0\].method"),
        ("[[rule]]\nformat='int4-g128'\nmethod='moqe'", "E_VALUE", r"rule\[0\]"),
        ("[[rule]]\nformat='int4'\nmethod='moqe'\nrole='attention'", "E_VALUE", r"rule\[0\].role"),
        ("[[rule]]\nformat='int4'\noptions={threshold=1.0}", "E_UNKNOWN", r"rule\[0\].options"),
        ("[[rule]]\nformat='int4'\nrole='experts'", "E_UNKNOWN", "did you mean 'expert'"),
        ("[[rule]]\nformat='int4'\nrole=[]", "E_VALUE", r"rule\[0\].role"),
        ("[[rule]]\nformat='int4'\nrole=[1]", "E_UNKNOWN", r"rule\[0\].role"),
        ("[[rule]]\nformat='int4'\nmatch=''", "E_VALUE", r"rule\[0\].match"),
        ("[[rule]]\nformat='int4'\nbits=4", "E_UNKNOWN", r"rule\[0\]"),
        ("[[rule]", "E_CORRUPT", "TOML"),
    ],
)  # fmt: skip
def test_mistakes_are_named(tmp_path, text, code, key):
    path = write(tmp_path, text)
    with pytest.raises(QmoeError, match=key) as error:
        Recipe.from_toml(path)
    assert error.value.code == code
    assert error.value.file == str(path)


@pytest.mark.parametrize("bits", INT_BITS)
@pytest.mark.parametrize("group", INT_GROUPS)
@pytest.mark.parametrize("zero_point", [True, False])
@pytest.mark.parametrize("half_step", [True, False])
def test_the_name_of_an_int_format_is_read_back(bits, group, zero_point, half_step):
    format = IntFormat(bits, group, zero_point, half_step=half_step)
    assert parse_format(format.name) == format
    assert Recipe.uniform(format.name).rules[0].spec.format == format


@pytest.mark.parametrize("role", [role for role in ROLES if role not in COMPRESSIBLE])
def test_roles_that_are_never_compressed(role):
    with pytest.raises(QmoeError, match="never compressed") as error:
        Recipe.uniform("int8", role=role)
    assert error.value.code == "E_VALUE"


def test_missing_and_undecodable_files(tmp_path):
    with pytest.raises(QmoeError) as error:
        Recipe.from_toml(tmp_path / "absent.toml")
    assert error.value.code == "E_MISSING"
    (tmp_path / "latin.toml").write_bytes(b"# \xe9\n")
    with pytest.raises(QmoeError) as error:
        Recipe.from_toml(tmp_path / "latin.toml")
    assert error.value.code == "E_CORRUPT"


def test_a_rule_that_matches_nothing_is_an_error():
    recipe = Recipe((Rule.make(format="int4"), Rule.make(format="int8", match="*.layer.*", role="attention")))
    with pytest.raises(QmoeError, match=r"rule\[1\]") as error:
        recipe.check_used(
            {"model.layers.0.mlp.experts.down_proj": "expert", "model.layers.0.attn.q.weight": "attention"}
        )
    assert error.value.code == "E_VALUE"
