from __future__ import annotations

from pathlib import Path
from typing import Literal

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from pydantic import Field, ValidationError

from nvembed.core.config import StrictModel, dump_config, load_config
from nvembed.core.errors import ConfigError


class Adapter(StrictModel):
    rank: int = 16
    dropout: float | None = 0.1


class Stage(StrictModel):
    steps: int
    name: str = "stage"
    learning_rate: float = 1e-4
    in_batch_negatives: bool = True
    adapter: Adapter | None = None


class Recipe(StrictModel):
    seed: int = 0
    output: Path = Path("runs/x")
    pooling: Literal["mean", "latent"] = "mean"
    stages: tuple[Stage, ...] = ()
    adapter: Adapter = Adapter()
    named: dict[str, Adapter] = Field(default_factory=dict)


@pytest.fixture
def recipe(tmp_path: Path):
    def write(text: str) -> Path:
        path = tmp_path / "recipe.yaml"
        path.write_text(text, encoding="utf-8")
        return path

    return write


def message_of(path: Path, *overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load_config(Recipe, path, overrides)
    text = str(caught.value)
    assert "\n" not in text
    return text.replace(str(path), "recipe.yaml")


def test_values_of_file_and_defaults(recipe):
    path = recipe("seed: 7\npooling: latent\nstages:\n  - {steps: 3, learning_rate: 2e-5}\n")
    config = load_config(Recipe, path)
    assert config.seed == 7
    assert config.pooling == "latent"
    assert config.output == Path("runs/x")
    assert config.stages == (Stage(steps=3, learning_rate=2e-5),)


def test_empty_file_gives_the_defaults(recipe):
    assert load_config(Recipe, recipe("# nothing\n")) == Recipe()


def test_frozen():
    with pytest.raises(ValidationError, match="frozen"):
        Recipe().seed = 3


def test_all_problems_at_once_with_key_line_and_near_match(recipe):
    path = recipe(
        "sede: 1\n"
        "seed: '1'\n"
        "stages:\n"
        "  - steps: 3\n"
        "    lerning_rate: 1e-4\n"
        "  - name: b\n"
        "    in_batch_negatives: 1\n"
        "pooling: max\n"
        "named:\n"
        "  a: {rnk: 3}\n"
    )
    text = message_of(path)
    assert text.startswith("recipe.yaml: 7 problems: ")
    for part in (
        "sede (line 1): unknown key, did you mean seed?",
        'seed (line 2): "1" given, expected a valid integer',
        "stages.0.lerning_rate (line 5): unknown key, did you mean learning_rate?",
        "stages.1.steps (line 6): missing, and it has no default",
        "stages.1.in_batch_negatives (line 7): 1 given, expected a valid boolean",
        "pooling (line 8): \"max\" given, expected 'mean' or 'latent'",
        "named.a.rnk (line 10): unknown key, did you mean rank?",
    ):
        assert part in text


def test_unknown_key_without_near_match_lists_the_known_ones(recipe):
    text = message_of(recipe("adapter:\n  zzz: 1\n"))
    assert text == "recipe.yaml: adapter.zzz (line 2): unknown key, known here: dropout, rank"


def test_key_given_twice_is_an_error(recipe):
    text = message_of(
        recipe("seed: 1\nstages:\n  - steps: 1\n    steps: 2\n    steps: 3\nseed: 2\n")
    )
    assert "seed (line 6): given twice, first on line 1" in text
    assert "stages.0.steps (line 4): given twice, first on line 3" in text
    assert "stages.0.steps (line 5): given twice, first on line 3" in text


@pytest.mark.parametrize(
    ("text", "where"),
    [("seed: [1\nname: 3\n", "recipe.yaml:2: "), ("a: 1\n\tb: 2\n", "recipe.yaml:2: ")],
)
def test_broken_yaml_names_the_line(recipe, text, where):
    message = message_of(recipe(text))
    assert message.startswith(where + "not valid YAML (")


LAUGHS = "a: &a [x, x]\n" + "".join(
    f"{new}: &{new} [{', '.join([f'*{old}'] * 9)}]\n"
    for old, new in zip("abcdefghi", "bcdefghij", strict=True)
)
MERGES = "a: &a {x: 1}\n" + "".join(
    f"{new}: &{new} {{<<: [{', '.join([f'*{old}'] * 9)}]}}\n"
    for old, new in zip("abcdefghi", "bcdefghij", strict=True)
)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("seed: &a [*a]\n", "recipe.yaml:1: not valid YAML (an alias contains itself)"),
        ("named: &a\n  b: {c: *a}\n", "recipe.yaml:1: not valid YAML (an alias contains itself)"),
        ("named: &a {<<: *a}\n", "recipe.yaml:1: not valid YAML (an alias contains itself)"),
        (LAUGHS, "not valid YAML (aliases unfold to more than 100,000 values)"),
        (MERGES, "not valid YAML (aliases unfold to more than 100,000 values)"),
        (f"seed: {'[' * 200}{']' * 200}\n", "not valid YAML (nested too deep)"),
        (f"seed: {'[' * 2000}{']' * 2000}\n", "not valid YAML (nested too deep)"),
        ("seed: 1\nname: a\x07b\n", "recipe.yaml:2: not valid YAML (a character that YAML does"),
        ("? [a, b]\n: 1\n", "recipe.yaml:1: not valid YAML (a key is a list or a mapping)"),
        ("seed: !!int abc\n", "recipe.yaml:1: not valid YAML ('abc' as int)"),
        ("seed: !!bool abc\n", "recipe.yaml:1: not valid YAML ('abc' as bool)"),
        (f"seed: {'9' * 5000}\n", "recipe.yaml:1: not valid YAML ('99999999999999999999' as int)"),
        ("output: !!timestamp 2024-01-01\n", "not valid YAML (the tag !!timestamp has no meaning"),
        ("output: !!set {a, b}\n", "not valid YAML (the tag !!set has no meaning here)"),
        ("output: !!python/name:os.system\n", "the tag !!python/name:os.system has no meaning"),
        ("a: 1\n---\nb: 2\n", "recipe.yaml:2: not valid YAML ("),
        ("1: 2\n", "recipe.yaml: 1 (line 1): unknown key"),
        ("null: 2\n", "recipe.yaml: null (line 1): unknown key"),
        ('output: "\\ud800"\n', "recipe.yaml: "),
    ],
)
def test_yaml_that_cannot_be_a_recipe_is_one_line(recipe, text, message):
    assert message in message_of(recipe(text))


def test_the_same_of_overrides(recipe):
    path = recipe("seed: 1\n")
    assert "(an alias contains itself)" in message_of(path, "named=&a [*a]")
    assert "(nested too deep)" in message_of(path, f"named={'[' * 2000}{']' * 2000}")
    assert "named.a.rank (override 'named={a: {rank: 1, rank: 2}}'): given twice" in message_of(
        path, "named={a: {rank: 1, rank: 2}}"
    )


def test_keys_are_texts_as_they_are_written(recipe):
    config = load_config(Recipe, recipe("named: {010: {rank: 1}, true: {rank: 2}, ~: {}}\n"))
    assert list(config.named) == ["010", "true", "~"]
    assert config.named["010"] == Adapter(rank=1)


def test_a_byte_order_mark_and_windows_line_ends_are_read(recipe):
    config = load_config(Recipe, recipe("\ufeffseed: 3\r\npooling: latent\r\n"))
    assert (config.seed, config.pooling) == (3, "latent")


def test_aliases_and_merges_are_read_and_own_keys_come_before_merged_ones(recipe):
    text = "adapter: &a {rank: 2, dropout: 0.5}\nnamed: {b: {rank: 3, <<: *a}, c: *a}\n"
    config = load_config(Recipe, recipe(text))
    assert config.named == {"b": Adapter(rank=3, dropout=0.5), "c": Adapter(rank=2, dropout=0.5)}


def test_not_a_mapping(recipe):
    assert "the file holds a list; expected key: value lines" in message_of(recipe("- 1\n"))


def test_missing_file(tmp_path):
    with pytest.raises(ConfigError, match=r"no-such\.yaml: no such file; expected a YAML recipe"):
        load_config(Recipe, tmp_path / "no-such.yaml")


def test_not_utf8(tmp_path):
    (tmp_path / "bad.yaml").write_bytes(b"name: \xff\xfe\n")
    with pytest.raises(ConfigError, match="not UTF-8"):
        load_config(Recipe, tmp_path / "bad.yaml")


@pytest.mark.parametrize("text", ["1e-5", "1E-5", "0.00001", "1.0e-5"])
def test_floats_in_scientific_notation(recipe, text):
    config = load_config(Recipe, recipe(f"stages: [{{steps: 1, learning_rate: {text}}}]\n"))
    assert config.stages[0].learning_rate == 1e-5


def test_words_that_are_no_booleans_stay_words(recipe):
    config = load_config(Recipe, recipe("stages: [{steps: 010, name: no}]\n"))
    assert config.stages[0].name == "no"
    assert config.stages[0].steps == 10


def test_date_is_a_text(recipe):
    config = load_config(Recipe, recipe("stages: [{steps: 1, name: 2024-01-01}]\n"))
    assert config.stages[0].name == "2024-01-01"


class Limits(StrictModel):
    stages: tuple[Stage, ...] = Field(min_length=1)
    name: str = Field(default="x", min_length=1)


def test_wrong_members_do_not_make_a_list_too_short(recipe):
    with pytest.raises(ConfigError) as caught:
        load_config(Limits, recipe("stages: [{steps: x}]\n"))
    assert str(caught.value).endswith(
        'recipe.yaml: stages.0.steps (line 1): "x" given, expected a valid integer'
    )


def test_values_outside_their_limits(recipe):
    with pytest.raises(ConfigError) as caught:
        load_config(Limits, recipe("stages: []\nname: ''\n"))
    text = str(caught.value)
    assert "stages (line 1): a list given; tuple should have at least 1 item" in text
    assert 'name (line 2): "" given; string should have at least 1 character' in text


# --- overrides ------------------------------------------------------------------------------------

TWO_STAGES = "stages:\n  - {steps: 1}\n  - {steps: 2, adapter: null}\n"


def test_overrides_set_scalars_list_members_and_nested_keys(recipe):
    config = load_config(
        Recipe,
        recipe(TWO_STAGES),
        [
            "seed=3",
            "stages.1.steps=20",
            "stages.1.adapter.rank=4",  # null becomes a mapping
            "adapter.dropout=null",  # not in the file: made
            "stages.0.name=a=b",
            "output=here",
        ],
    )
    assert config.seed == 3
    assert config.output == Path("here")
    assert config.stages[0] == Stage(steps=1, name="a=b")
    assert config.stages[1] == Stage(steps=20, adapter=Adapter(rank=4))
    assert config.adapter == Adapter(dropout=None)


def test_last_override_wins_and_whole_lists_can_be_set(recipe):
    path = recipe(TWO_STAGES)
    config = load_config(Recipe, path, ["stages=[{steps: 5}]", "stages.0.steps=6"])
    assert config.stages == (Stage(steps=6),)


@pytest.mark.parametrize(
    ("override", "part"),
    [
        ("seed", "override 'seed': expected key.path=value"),
        ("=3", "override '=3': expected key.path=value"),
        ("stages..steps=3", "override 'stages..steps=3': expected key.path=value"),
        ("seed=[1", "override 'seed=[1': the value is not valid YAML"),
        ("stages.2.steps=3", "stages is a list, expected an index (0 to 1) instead of '2'"),
        ("stages.steps=3", "stages is a list, expected an index (0 to 1) instead of 'steps'"),
        ("stages.0.steps.x=3", "stages.0.steps is a number (1), it has no key 'x'"),
        (
            "stages.0.stepps=3",
            "stages.0.stepps (override 'stages.0.stepps=3'): unknown key, did you mean steps",
        ),
        (
            "optimizer.lr=1",
            "optimizer (override 'optimizer.lr=1'): unknown key, known here: adapter, named",
        ),
        ("seed=x", "seed (override 'seed=x'): \"x\" given, expected a valid integer"),
    ],
)
def test_bad_overrides(recipe, override, part):
    assert part in message_of(recipe(TWO_STAGES), override)


def test_list_members_are_called_by_name_too(recipe):
    text = "stages: [{name: one, steps: 1}, {name: a.b, steps: 2}, {name: '0', steps: 3}]\n"
    changes = ["stages.one.steps=5", "stages.a.b.adapter.rank=6", "stages.0.learning_rate=1"]
    config = load_config(Recipe, recipe(text), changes)
    assert config.stages[0] == Stage(steps=5, name="one", learning_rate=1)  # an index comes first
    assert config.stages[1] == Stage(steps=2, name="a.b", adapter=Adapter(rank=6))
    assert config.stages[2] == Stage(steps=3, name="0")
    renamed = load_config(Recipe, recipe(text), ["stages.one.name=new", "stages.new.steps=9"])
    assert renamed.stages[0] == Stage(steps=9, name="new")
    expected = "an index (0 to 2) or a name (one, a.b, 0) instead of 'two'"
    assert message_of(recipe(text), "stages.two.steps=8") == (
        f"recipe.yaml: override 'stages.two.steps=8': stages is a list, expected {expected}"
    )


def test_problems_of_file_and_overrides_come_together(recipe):
    text = message_of(recipe("sede: 1\n"), "stages.0.steps=1", "seed=x")
    assert "3 problems" in text
    assert "sede (line 1)" in text
    assert "override 'stages.0.steps=1'" in text
    assert "seed (override 'seed=x')" in text


# --- dump -----------------------------------------------------------------------------------------


@given(
    name=st.text(st.characters(blacklist_categories=("Cs", "Cc")), max_size=20)
    | st.sampled_from(["1e-4", "no", "null", "~", "0x1F", "2024-01-01", "1_000", "<<", "=", " a "]),
    rate=st.floats(allow_nan=False),
    steps=st.integers(-(10**20), 10**20),
)
def test_dump_and_load_round_trip(tmp_path_factory, name, rate, steps):
    config = Recipe(
        stages=(Stage(steps=steps, name=name, learning_rate=rate),),
        named={"a": Adapter(dropout=None)},
    )
    path = tmp_path_factory.mktemp("dump") / "config.yaml"
    path.write_text(dump_config(config), encoding="utf-8")
    assert load_config(Recipe, path) == config


def test_dump_is_readable_yaml_in_field_order():
    text = dump_config(Recipe(stages=(Stage(steps=1, learning_rate=1e-4),)))
    assert list(yaml.safe_load(text)) == list(Recipe.model_fields)
    assert "learning_rate: 0.0001" in text


def test_a_configuration_knows_its_folder_and_is_equal_without_it(recipe):
    path = recipe("seed: 3\n")
    config = load_config(Recipe, path)
    assert config.source_folder == path.parent
    assert config.model_copy(update={"seed": 4}).source_folder == path.parent
    assert config == Recipe(seed=3)
    assert Recipe(seed=3).source_folder is None
    assert load_config(Recipe, None).source_folder is None
    assert "folder" not in dump_config(config)
