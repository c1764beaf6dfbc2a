"""Whatever is wrong in a recipe is named, with what would be right, before anything starts."""

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from rarefy.train import load, parse
from rarefy.train.recipe import differences
from tests.train.runs import plain

RECIPES = sorted(Path(__file__).parents[2].glob("recipes/[!c]*.yaml"))  # compare-*.yaml are plans of many runs


def test_there_are_recipes() -> None:
    assert RECIPES


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.name)
def test_every_recipe_parses_and_survives_the_round_trip(path: Path) -> None:
    recipe = load(path)
    assert parse(recipe.to_dict()) == recipe
    assert parse(yaml.safe_load(yaml.safe_dump(recipe.to_dict()))) == recipe


def test_the_round_trip_with_every_key_set() -> None:
    recipe = parse(
        {
            "name": "all",
            "model": {"name": "resnet20", "width": 8, "stem_stride": 2},
            "method": {"name": "autosparse", "target": "9e-1", "floor": {"conv*": 0.1}, "exclude": ["fc"]},
            "data": {"folder": "/data", "train_size": 1000, "augment": "crop-flip"},
            "optimizer": {"name": "adamw", "lr": "1e-3", "weight_decay": 0, "norm_weight_decay": 0.1, "ema": 0.999},
            "schedule": {"epochs": 3, "batch_size": 64, "accumulate": 2, "warmup_epochs": 1, "label_smoothing": 0.1},
            "seed": 7,
            "precision": "bf16",
            "channels_last": False,
            "threads": 2,
            "accelerate": False,
            "shard": True,
            "compile": False,
        }
    )
    assert parse(recipe.to_dict()) == recipe
    assert recipe.method.options == {"target": 0.9, "floor": {"conv*": 0.1}, "exclude": ["fc"]}
    assert (recipe.optimizer.lr, recipe.optimizer.weight_decay, recipe.schedule.warmup_epochs) == (0.001, 0.0, 1.0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"optimiser": {}}, "unknown key in the recipe: 'optimiser'; did you mean 'optimizer'?"),
        ({"optimizer": {"weight_decai": 1}}, "key in optimizer: 'weight_decai'; did you mean 'weight_decay'?"),
        ({"schedule": {"epoch": 1}}, "unknown key in schedule: 'epoch'; did you mean 'epochs'?"),
        ({"data": {"augmnt": "none"}}, "unknown key in data: 'augmnt'; did you mean 'augment'?"),
        ({"lr": 0.1}, "unknown key in the recipe: 'lr'; did you mean 'optimizer.lr', counted from the top?"),
        ({"optimizer": {"seed": 1}}, "unknown key in optimizer: 'seed'; did you mean 'seed', counted from the top?"),
        ({"zzz": 1}, "unknown key in the recipe: 'zzz' (there is name, model, method, data"),
        ({"model": {"name": "resnet2"}}, "unknown model.name: 'resnet2'; did you mean 'resnet20'?"),
        ({"model": {"name": "resnet20", "widht": 8}}, "option of model 'resnet20': 'widht'; did you mean 'width'?"),
        ({"method": {"name": "autospars"}}, "unknown method.name: 'autospars'; did you mean 'autosparse'?"),
        ({"method": {"name": "str", "tagret": 1}}, "unknown option of method 'str': 'tagret'; did you mean 'target'?"),
        ({"method": {"name": "str", "policy": "cost"}}, "unknown option of method 'str': 'policy'"),
        ({"method": {"name": "dense", "target": 0.9}}, "option of method 'dense': 'target' (there is none)"),
        ({"method": {"name": "str", "total_steps": 9}}, "unknown option of method 'str': 'total_steps'"),
        ({"data": {"name": "fashion-mnist"}}, "unknown data.name: 'fashion-mnist'; did you mean 'fashion_mnist'?"),
        ({"data": {"augment": "crop_flip"}}, "unknown data.augment: 'crop_flip'; did you mean 'crop-flip'?"),
        ({"optimizer": {"name": "adam"}}, "unknown optimizer.name: 'adam'; did you mean 'adamw'?"),
        ({"precision": "fp23"}, "unknown precision: 'fp23'; did you mean 'fp32'?"),
    ],
)
def test_a_misspelt_name_gets_the_nearest_right_one(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        parse(plain(**changes))
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seed": 1.5}, "seed must be a whole number, got 1.5"),
        ({"seed": True}, "seed must be a whole number, got True"),
        ({"seed": None}, "seed must be a whole number, got None"),
        ({"name": 5}, "name must be text, got 5"),
        ({"precision": False}, "precision must be text, got False"),
        ({"channels_last": 1}, "channels_last must be true or false, got 1"),
        ({"threads": "2"}, "threads must be a whole number or null, got '2'"),
        ({"schedule": [1]}, "schedule must be a mapping of keys, got [1]"),
        ({"schedule": {"epochs": "8"}}, "schedule.epochs must be a whole number, got '8'"),
        ({"optimizer": {"lr": "fast"}}, "optimizer.lr must be a number, got 'fast'"),
        ({"optimizer": {"lr": True}}, "optimizer.lr must be a number, got True"),
        ({"model": "resnet20"}, "model needs a name, such as `model: {name: ...}`, got 'resnet20'"),
        ({"method": {"target": 0.9}}, "method needs a name, such as `method: {name: ...}`, got {'target': 0.9}"),
        ({"model": {"name": "resnet20", "width": "8"}}, "model.width must be a whole number, got '8'"),
        ({"method": {"name": "str", "target": "x"}}, "method.target must be a number or null, got 'x'"),
        ({"method": {"name": "str", "exclude": "fc"}}, "method.exclude must be a list or null, got 'fc'"),
        ({"method": {"name": "str", "exclude": [1]}}, "method.exclude must be a list or null, got [1]"),
        ({"method": {"name": "str", "floor": [1]}}, "method.floor must be a number or a mapping, got [1]"),
        ({"method": {"name": "str", "granularity": 1}}, "method.granularity must be text, got 1"),
        ({"method": {"name": "autosparse", "policy": 1}}, "method.policy must be text or null, got 1"),
        # Out of range.
        ({"name": "a/b"}, "name must be a folder's name, got 'a/b'"),
        ({"name": ".."}, "name must be a folder's name, got '..'"),
        ({"name": ""}, "name must be a folder's name, got ''"),
        ({"data": {"train_size": 0}}, "data.train_size must be at least 1, got 0"),
        ({"schedule": {"epochs": 0}}, "schedule.epochs must be at least 1, got 0"),
        ({"schedule": {"batch_size": -1}}, "schedule.batch_size must be at least 1, got -1"),
        ({"schedule": {"accumulate": 0}}, "schedule.accumulate must be a divisor of batch_size=32, got 0"),
        ({"schedule": {"accumulate": 3}}, "schedule.accumulate must be a divisor of batch_size=32, got 3"),
        ({"schedule": {"warmup_epochs": 3}}, "schedule.warmup_epochs must be in [0, epochs=3), got 3.0"),
        ({"schedule": {"warmup_epochs": float("nan")}}, "schedule.warmup_epochs must be in [0, epochs=3), got nan"),
        ({"schedule": {"label_smoothing": 1}}, "schedule.label_smoothing must be in [0, 1), got 1.0"),
        ({"optimizer": {"lr": 0}}, "optimizer.lr must be above 0, and finite, got 0.0"),
        ({"optimizer": {"lr": float("inf")}}, "optimizer.lr must be above 0, and finite, got inf"),
        ({"optimizer": {"momentum": 1}}, "optimizer.momentum must be in [0, 1), got 1.0"),
        ({"optimizer": {"momentum": 0, "nesterov": True}}, "optimizer.nesterov must be false without SGD's momentum"),
        ({"optimizer": {"name": "adamw", "nesterov": True}}, "optimizer.nesterov must be false without SGD's momentum"),
        ({"optimizer": {"weight_decay": -1}}, "optimizer.weight_decay must be at least 0.0, and finite, got -1.0"),
        (
            {"optimizer": {"norm_weight_decay": float("nan")}},
            "optimizer.norm_weight_decay must be at least 0.0, and fini",
        ),
        ({"optimizer": {"ema": 1}}, "optimizer.ema must be in (0, 1), or null, got 1.0"),
        ({"optimizer": {"ema": 0}}, "optimizer.ema must be in (0, 1), or null, got 0.0"),
        ({"shard": True, "precision": "fp16"}, "shard must be false in precision: fp16, got True"),
        ({"shard": True, "accelerate": True, "method": {"name": "set"}}, "shard must be false with accelerate: true"),
        ({"compile": True, "shard": True}, "compile must be false with shard: true, got True"),
        ({"compile": True, "accelerate": True, "method": {"name": "set"}}, "compile must be false with accelerate: tr"),
        ({"threads": 0}, "threads must be in [1, 1024], or null, got 0"),
        ({"model": {"name": "resnet20", "width": 1 << 21}}, "model.width must be at most 1048576, got 2097152"),
        ({"model": {"name": "mobilenet_v1", "width": 1e300}}, "model.width must be at most 1048576, got 1e+300"),
        # Of more digits than Python writes.
        ({"seed": 1 << 20000}, "seed must be below 2^31, got a number of thousands of digits"),
        ({"optimizer": {"lr": 1 << 20000}}, "optimizer.lr must be a number, got a number of thousands of digits"),
        ({"schedule": 1 << 20000}, "schedule must be a mapping of keys, got a number of thousands of digits"),
        # Before anything is measured.
        ({"method": {"name": "gmp", "target_ms": -1}}, "target_ms must be a finite number above 0, got -1.0"),
        ({"method": {"name": "gmp", "target_ms": 0}}, "target_ms must be a finite number above 0, got 0.0"),
        ({"method": {"name": "str", "target_ms": float("nan")}}, "target_ms must be a finite number above 0, got nan"),
        ({"method": {"name": "gmp", "target": 0.9, "target_ms": 1}}, "not both target and target_ms"),
        ({"method": {"name": "gmp", "target": 1}}, "target must be in (0, 1), got 1.0"),
    ],
)
def test_a_wrong_value_is_named_with_what_is_right(changes: dict[str, Any], message: str) -> None:
    wrong = {**plain(), **changes} if not isinstance(next(iter(changes.values())), dict) else plain(**changes)
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        parse(wrong)
    assert message in str(caught.value)


def test_layers_of_a_translator_have_an_end() -> None:
    data = {"name": "translation", "folder": "x"}

    def layers(count: int) -> Any:
        return parse({"name": "x", "model": {"name": "gnmt", "num_layers": count}, "data": data}).model.options

    assert layers(1000) == {"num_layers": 1000}
    with pytest.raises(ValueError, match="model.num_layers must be at most 1000, got 100000000"):
        layers(100_000_000)


@pytest.mark.parametrize("number", ["0x" + "f" * 5000, "9" * 201, "-" + "0" * 5000, "1" + ":59" * 9000])
def test_numbers_of_endless_digits_are_named(number: str, tmp_path: Path) -> None:
    path = written(tmp_path, f"model: {{name: fashion_cnn}}\nseed: {number}\n")
    message = re.escape(f"is not valid YAML: line 2, 'seed: {number[:20]}'..., has a number of more than 200 digits")
    with pytest.raises(ValueError, match=f"{path} {message}"):
        load(path)
    with pytest.raises(ValueError, match=r"^--set optimizer.lr=.* has a number of more than 200 digits"):
        load(written(tmp_path), [f"optimizer.lr={number}"])
    assert load(written(tmp_path), ["optimizer.lr=0x" + "0" * 197 + "2"]).optimizer.lr == 2.0


def test_what_a_recipe_must_have() -> None:
    with pytest.raises(ValueError, match="the recipe lacks 'model'"):
        parse({"name": "x"})
    assert parse({"name": "x", "model": {"name": "fashion_cnn"}}).method.name == "dense"


def written(tmp_path: Path, text: str = "model: {name: fashion_cnn}\noptimizer: {lr: 5e-4}\n") -> Path:
    path = tmp_path / "small.yaml"
    path.write_text(text)
    return path


def test_a_file_gives_its_name_and_yaml_text_is_a_number(tmp_path: Path) -> None:
    recipe = load(written(tmp_path))
    assert (recipe.name, recipe.optimizer.lr) == ("small", 5e-4)


@pytest.mark.parametrize(
    ("change", "path", "value"),
    [
        ("seed=3", ("seed",), 3),
        ("optimizer.lr=5e-4", ("optimizer", "lr"), 5e-4),
        ("schedule.warmup_epochs=1", ("schedule", "warmup_epochs"), 1.0),
        ("data.folder=/a=b", ("data", "folder"), "/a=b"),
        ("data.folder=", ("data", "folder"), None),
        ("data.train_size=null", ("data", "train_size"), None),
        ("channels_last=false", ("channels_last",), False),
        ("name=another", ("name",), "another"),
        ("method={name: str, target: 0.9}", ("method", "options"), {"target": 0.9}),
    ],
)
def test_set_changes_a_key(change: str, path: tuple[str, ...], value: object, tmp_path: Path) -> None:
    found: object = load(written(tmp_path), [change])
    for key in path:
        found = getattr(found, key)
    assert found == value
    assert type(found) is type(value)


def test_set_takes_effect_in_order(tmp_path: Path) -> None:
    changes = ["method.name=autosparse", "method.target=0.9", "method.target=0.95", "method.floor={conv1: 0.5}"]
    assert load(written(tmp_path), changes).method.options == {"target": 0.95, "floor": {"conv1": 0.5}}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("seed", "--set takes KEY=VALUE, such as method.target=0.95, got 'seed'"),
        ("=3", "--set takes KEY=VALUE"),
        ("seed.deep=3", "seed must be a whole number"),
        ("optimizer.lr.x=3", "--set optimizer.lr.x=3: 'lr' holds '5e-4', not keys"),
        ("schedul.epochs=3", "did you mean 'schedule'?"),
        ("seed=[1", "--set seed=[1: '[1' is not valid YAML"),
        ("optimizer..lr=3", "unknown key in optimizer: ''"),
    ],
)
def test_set_of_nonsense(change: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        load(written(tmp_path), [change])
    assert message in str(caught.value)


#: A list of 10^12 texts in half a kilobyte.
BOMB = "a0: &a0 [x]\n" + "".join(f"a{n + 1}: &a{n + 1} [{', '.join([f'*a{n}'] * 10)}]\n" for n in range(12))


def test_a_merged_mapping_may_be_overridden(tmp_path: Path) -> None:
    path = tmp_path / "small.yaml"
    path.write_text("model: {<<: {name: resnet20, width: 8}, width: 4}\nmethod: {name: dense}\n")
    assert load(path).model.options == {"width": 4}


def test_aliases_that_stay_small(tmp_path: Path) -> None:
    path = tmp_path / "small.yaml"
    path.write_text("model: {name: resnet20, width: &n 8}\nmethod: {name: dense}\nseed: *n\n")
    assert (load(path).model.options, load(path).seed) == ({"width": 8}, 8)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"model: {name: [", "small.yaml is not valid YAML"),
        (b"\xff\xfe\xfa", "small.yaml is not valid YAML"),
        (b"model: &m {name: *m}", "small.yaml is not valid YAML: its aliases make more than 1048576 characters"),
        (BOMB.encode(), "small.yaml is not valid YAML: its aliases make more than 1048576 characters"),
        (b"model: {name: a}\nseed: 1\nmodel: {name: b}\n", "valid YAML: the key 'model' stands twice, again in line 3"),
        (b"model: {name: a, name: b}", "valid YAML: the key 'name' stands twice, again in line 1"),
        (b"- a\n- b\n", r"must hold keys such as name, model and method, got \['a', 'b'\]"),
        (b"", "must hold keys such as name, model and method, got None"),
    ],
)
def test_a_file_that_is_no_recipe(content: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / "small.yaml"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message):
        load(path)


@pytest.mark.parametrize("name", ["nothing.yaml", "."])
def test_no_file(name: str, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="there is no recipe .*; recipes are YAML files such as"):
        load(tmp_path / name)


def test_differences_name_the_inmost_key() -> None:
    old = {"a": 1, "b": {"c": 2, "d": {"e": 3}}, "gone": 4}
    assert differences(old, {"a": 1, "b": {"c": 5, "d": {"e": 3}}}) == [
        "b.c (2 there, 5 here)",
        "gone (4 there, None here)",
    ]
    assert differences(old, old) == []
