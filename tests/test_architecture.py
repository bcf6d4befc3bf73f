"""Who may import whom, read from the source with ``ast``: nothing here is imported, except in processes of their own.

The table below is the rule. A new folder or module must be given its place in it.
"""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = "lit_instruct"


class Layer(NamedTuple):
    """What the modules of a layer may import: parts of the package, and of the outside world (beyond ``sys``-like)."""

    parts: frozenset[str]
    outside: frozenset[str]


def layer(parts: str, outside: str) -> Layer:
    return Layer(frozenset(parts.split()), frozenset(outside.split()))


_LOWER = "types functional models rollouts rewards"
_ALL = f"{_LOWER} data modules callbacks cli toyworld feedback evaluation planning reporting"

LAYERS = {
    "types": layer("types", "torch"),
    "functional": layer("types functional", "torch"),
    "models": layer(
        "types functional models",
        "torch numpy transformers huggingface_hub safetensors peft bitsandbytes jinja2 flash_attn",
    ),
    "rollouts": layer(_LOWER, "torch numpy"),
    "rewards": layer(_LOWER, "torch numpy requests urllib3"),
    "data": layer(f"{_LOWER} data", "torch numpy lightning torchdata datasets pyarrow jinja2 yaml"),
    "modules": layer(f"{_LOWER} modules", "torch numpy lightning jsonargparse torchmetrics"),
    "callbacks": layer(f"{_LOWER} data modules callbacks", "torch numpy lightning"),
    "__main__": layer("cli", ""),
    "cli": layer(f"{_ALL.replace('callbacks', '')} commands", "lightning"),
    "commands": layer(_ALL.replace("callbacks", ""), "jsonargparse"),
    "toyworld": layer(_ALL.replace("callbacks", ""), "torch numpy transformers tokenizers yaml"),
    "feedback": layer(
        _ALL.replace("callbacks", ""), "torch numpy transformers starlette uvicorn markdown_it scipy krippendorff"
    ),
    "evaluation": layer(_ALL.replace("callbacks", ""), "torch numpy transformers"),
    "reporting": layer("types reporting", "numpy yaml jinja2 matplotlib PIL tensorboard google"),
    "planning": layer("types planning", "yaml huggingface_hub"),  # types: the error alone, late
    "": layer("data modules", ""),  # lit_instruct/__init__.py: under TYPE_CHECKING only
}
"""types <- functional <- models <- rollouts, rewards <- data | modules <- cli; nobody imports callbacks."""

EXCEPTIONS = {
    "lit_instruct.data.encoding": {"transformers"},  # the tokenizer's type
    "lit_instruct.data.presidio": {"presidio_analyzer", "spacy", "tldextract"},  # an optional package
    "lit_instruct.evaluation.harness": {"lm_eval"},  # an optional package
    "lit_instruct.evaluation.cross_validation": {"yaml"},  # reads and writes the settings of its runs
    "lit_instruct.feedback.agreement_report": {"matplotlib"},  # the picture
    "lit_instruct.modules.reward_metrics": {"matplotlib"},  # the reliability picture
    "lit_instruct.modules.checkpoints": {"transformers"},  # types of configuration and tokenizer in a signature
    "lit_instruct.modules.guards": {"transformers"},  # the tokenizer's type in a signature
}

LAZY_IN_CLI = {"toyworld", "feedback", "evaluation", "modules", "data", "models", "rollouts", "rewards", "functional"}
LAZY_IN_CLI |= {"planning", "reporting", "commands"}
NO_TRAINER = {"types", "functional", "models", "rollouts", "rewards"}
HEAVY = {"torch", "lightning", "transformers", "datasets", "numpy", "jsonargparse", "tokenizers"}


class Import(NamedTuple):
    """One imported module: its dotted name, the line, and whether it happens when the file is imported."""

    name: str
    line: int
    at_once: bool


def source_files() -> Iterator[tuple[str, Path]]:
    """Dotted names and paths of all real files; ``lit_instruct/callbacks`` is a link and is read at its real place."""
    for top in (ROOT / PACKAGE, ROOT / "callbacks"):
        for folder, _, names in os.walk(top, followlinks=False):
            for name in names:
                if name.endswith(".py"):
                    path = Path(folder) / name
                    parts = path.relative_to(ROOT).with_suffix("").parts
                    parts = parts if parts[0] == PACKAGE else (PACKAGE, *parts)
                    yield ".".join(parts[:-1] if parts[-1] == "__init__" else parts), path


def is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)


def imports_of(tree: ast.AST, module: str, *, is_package: bool = False, at_once: bool = True) -> Iterator[Import]:
    """Every import, also in functions and under ``TYPE_CHECKING``; relative ones resolved."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Import(alias.name, node.lineno, at_once)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = module.split(".")[: len(module.split(".")) - node.level + is_package]
                base = ".".join([*parents, base]).strip(".")
            for alias in node.names:  # `from lit_instruct import rollouts` imports lit_instruct.rollouts
                yield Import(f"{base}.{alias.name}" if base == PACKAGE else base, node.lineno, at_once)
        else:
            later = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda) or is_type_checking(node)
            yield from imports_of(node, module, is_package=is_package, at_once=at_once and not later)


def layer_of(module: str) -> str:
    return module.split(".")[1] if "." in module else ""


def import_breaches(module: str, source: str, *, is_package: bool = False) -> list[str]:
    """What ``source``, as the file of ``module``, imports against the table."""
    here = layer_of(module)
    if here not in LAYERS:
        return [f"{module}: {here!r} has no place in the table of layers"]
    rule, found = LAYERS[here], []
    for imported in imports_of(ast.parse(source), module, is_package=is_package):
        top, place = imported.name.split(".")[0], f"{module}:{imported.line}"
        if top == "callbacks":
            found.append(f"{place}: imports the top-level callbacks; only the repository root has it")
        elif top == PACKAGE:
            part = layer_of(imported.name)
            if part.startswith("__") or not part:
                if here != "cli":  # the version and the public names
                    found.append(f"{place}: imports lit_instruct itself, which leads everywhere")
            elif part not in rule.parts:
                found.append(f"{place}: {here or PACKAGE} imports {part}")
            elif here in ("cli", "") and imported.at_once and (part in LAZY_IN_CLI or here == ""):
                found.append(f"{place}: {module} imports {part} at once; import it where it is used")
        elif top not in sys.stdlib_module_names and top not in rule.outside | EXCEPTIONS.get(module, set()):
            found.append(f"{place}: {here or PACKAGE} imports {top}")
        elif here in ("cli", "") and top in HEAVY and imported.at_once:
            found.append(f"{place}: {module} imports {top} at once; import it where it is used")
    return found


def name_of(node: ast.AST) -> str:
    """``a.b.c`` of a chain of names; empty for anything else."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute):
        return f"{name_of(node.value)}.{node.attr}"
    return ""


def is_true(call: ast.Call, keyword: str) -> bool:
    return any(k.arg == keyword and isinstance(k.value, ast.Constant) and k.value.value is True for k in call.keywords)


def code_breaches(module: str, source: str) -> list[str]:
    """Calls that could run code from a file, imports by string, and reaches for the Trainer."""
    found, here = [], layer_of(module)
    tree = ast.parse(source)
    for node in ast.walk(tree):
        place = f"{module}:{getattr(node, 'lineno', 0)}"
        if isinstance(node, ast.Attribute):
            if node.attr == "trainer" and here in NO_TRAINER:
                found.append(f"{place}: {name_of(node)} in arithmetic")
            if node.attr.startswith("_") and name_of(node.value).split(".")[-1] == "trainer":
                found.append(f"{place}: {name_of(node)} is private to the Trainer")
        if isinstance(node, ast.ImportFrom) and node.module in ("pickle", "dill", "cloudpickle", "joblib"):
            found += [f"{place}: from {node.module} import {a.name}" for a in node.names if a.name.startswith("load")]
        if not isinstance(node, ast.Call):
            continue
        name = name_of(node.func)
        if name in {f"{package}.load{s}" for package in ("pickle", "dill", "cloudpickle", "joblib") for s in ("", "s")}:
            found.append(f"{place}: {name} runs code from a file")
        elif name == "torch.load" and not is_true(node, "weights_only"):
            found.append(f"{place}: torch.load without weights_only=True")
        elif name in ("np.load", "numpy.load") and is_true(node, "allow_pickle"):
            found.append(f"{place}: {name} with allow_pickle=True")
        elif name in ("yaml.load", "yaml.unsafe_load", "yaml.full_load", "eval", "exec"):
            found.append(f"{place}: {name} runs code from text")
        elif name in ("__import__", "importlib.import_module") and module not in (PACKAGE, f"{PACKAGE}.callbacks"):
            found.append(f"{place}: {name} hides an import from this test")
    return found


# -- the real files


def test_files_are_found():
    names = dict(source_files())
    assert {"lit_instruct", "lit_instruct.cli", "lit_instruct.functional.ppo", "lit_instruct.rollouts"} <= names.keys()
    assert "lit_instruct.callbacks.kl_monitor" in names
    assert names["lit_instruct.callbacks"] == ROOT / "callbacks" / "__init__.py"
    assert len(names) == len({path.resolve() for path in names.values()})


def test_imports_keep_their_direction():
    found = []
    for module, path in source_files():
        is_package = path.name == "__init__.py"
        found += import_breaches(module, path.read_text(encoding="utf-8"), is_package=is_package)
    assert not found, "\n".join(found)


def test_code_keeps_the_rules():
    found = [
        breach for module, path in source_files() for breach in code_breaches(module, path.read_text(encoding="utf-8"))
    ]
    assert not found, "\n".join(found)


def test_exceptions_are_still_needed():
    sources = {module: path.read_text(encoding="utf-8") for module, path in source_files()}
    for module, packages in EXCEPTIONS.items():
        used = {imported.name.split(".")[0] for imported in imports_of(ast.parse(sources[module]), module)}
        assert packages <= used, f"{module} no longer imports {packages - used}: take it out of EXCEPTIONS"


# -- each rule can fail


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("types", "from lit_instruct.functional import whiten"),
        ("types", "import numpy"),
        ("functional.ppo", "from lit_instruct.models.forward import join"),
        ("functional.ppo", "import numpy as np"),
        ("functional.ppo", "def f():\n    import transformers"),
        ("functional.ppo", "from lit_instruct import rollouts"),
        ("functional.ppo", "from ..rollouts import assess"),
        ("functional.ppo", "from .. import rollouts"),
        ("models.forward", "from lit_instruct.rollouts import collect"),
        ("models.forward", "import lightning"),
        ("models.forward", "from lightning.pytorch import seed_everything"),
        ("models.forward", "if TYPE_CHECKING:\n    import lightning.pytorch as pl"),
        ("rollouts", "from lit_instruct.data.collate import collate_prompts"),
        ("rollouts", "import transformers"),
        ("rewards", "from transformers import AutoModel"),
        ("rewards", "import lightning.fabric"),
        ("data.collate", "from lit_instruct.modules.sft import SFTModule"),
        ("data.collate", "import transformers"),
        ("modules.sft", "from lit_instruct.data.modules import PromptDataModule"),
        ("modules.sft", "import transformers"),
        ("modules.sft", "from lit_instruct import PromptDataModule"),
        ("modules.sft", "from lit_instruct.callbacks import KLMonitor"),
        ("modules.sft", "import callbacks.kl_monitor"),
        ("modules.sft", "from callbacks import KLMonitor"),
        ("modules.sft", "from lit_instruct.toyworld import ToyWorld"),
        ("modules.sft", "try:\n    import lit_instruct.evaluation.win_rate\nexcept ImportError:\n    pass"),
        ("callbacks.kl_monitor", "from lit_instruct.cli import main"),
        ("callbacks.kl_monitor", "from callbacks.weight_ema import WeightEMA"),
        ("callbacks.kl_monitor", "import transformers"),
        ("toyworld.world", "import lightning"),
        ("toyworld.world", "from lit_instruct.callbacks import KLMonitor"),
        ("evaluation.win_rate", "import lightning"),
        ("cli", "from lit_instruct.toyworld.quickstart import main"),
        ("cli", "import lightning"),
        ("cli", "from lit_instruct.callbacks import KLMonitor"),
        ("utils", "import math"),
        ("", "from lit_instruct.modules.sft import SFTModule"),
        ("", "import torch"),
    ],
)
def test_a_made_up_import_is_found(module, source):
    name = f"{PACKAGE}.{module}".rstrip(".")
    assert len(import_breaches(name, source, is_package=not module)) == 1


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("functional.ppo", "import math\nfrom torch import Tensor\nfrom .kl import kl_estimates"),
        ("functional.ppo", "from lit_instruct.types import Rollout"),
        ("modules.sft", "import lightning.pytorch as pl\nfrom lit_instruct.rollouts import assess"),
        ("data.encoding", "from transformers import PreTrainedTokenizerBase"),
        ("cli", "def main():\n    import lightning\n    from lit_instruct.toyworld.quickstart import main"),
        ("cli", "if TYPE_CHECKING:\n    from lightning.pytorch.cli import LightningCLI"),
        ("", "if TYPE_CHECKING:\n    from lit_instruct.modules.sft import SFTModule"),
    ],
)
def test_a_proper_import_is_not(module, source):
    assert import_breaches(f"{PACKAGE}.{module}".rstrip("."), source, is_package=not module) == []


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("functional.ppo", "x = self.trainer.world_size"),
        ("rollouts", "x = module.trainer"),
        ("callbacks.kl_monitor", "trainer._results"),
        ("modules.sft", "self.trainer._checkpoint_connector.restore()"),
        ("models.handover", "torch.load(path)"),
        ("models.handover", "torch.load(path, weights_only=False)"),
        ("models.handover", "torch.load(path, weights_only=flag)"),
        ("models.handover", "pickle.load(file)"),
        ("data.base", "pickle.loads(text)"),
        ("data.base", "from pickle import loads"),
        ("data.base", "np.load(path, allow_pickle=True)"),
        ("data.base", "yaml.load(text)"),
        ("data.base", "eval(text)"),
        ("functional.ppo", "importlib.import_module('lit_instruct.modules.ppo')"),
    ],
)
def test_a_made_up_call_is_found(module, source):
    assert len(code_breaches(f"{PACKAGE}.{module}", source)) == 1


def test_proper_calls_are_not():
    source = (
        "torch.load(path, weights_only=True)\nself.trainer.world_size\nyaml.safe_load(x)\nmodel.eval()\njson.load(f)"
    )
    assert code_breaches(f"{PACKAGE}.modules.ppo", source) == []


# -- in processes of their own


def run(source: str) -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", source], env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]


LOADED = "import sys\ndef loaded(*names): return sorted(set(names) & set(sys.modules))\n"


def test_the_package_and_its_help_cost_nothing():
    run(
        LOADED + "import lit_instruct, lit_instruct.cli, lit_instruct.callbacks\n"
        "dir(lit_instruct), lit_instruct.__all__, lit_instruct.__version__\n"
        "lit_instruct.cli.main(['--help'])\n"
        "lit_instruct.cli.main(['--version'])\n"
        "heavy = loaded('torch', 'lightning', 'pytorch_lightning', 'transformers', 'numpy', 'datasets')\n"
        "assert not heavy, heavy\n"
    )


HELP = "def help_of(*command):\n    try: lit_instruct.cli.main([*command, '--help'])\n    except SystemExit: pass\n"


def test_commands_load_what_they_need():
    """Preparing data needs no Trainer and no network; a stage's options no data, dashboard or model's own file."""
    run(
        LOADED + HELP + "import lit_instruct.cli\n"
        "help_of('data', 'prepare')\n"
        "found = loaded('lightning', 'pytorch_lightning', 'torchmetrics', 'matplotlib', 'datasets', 'pandas',\n"
        "               'transformers.modeling_utils')\n"
        "assert not found, found\n"
        "help_of('sft', 'fit')\n"
        # scipy is not asked for: torchmetrics loads it wherever it is installed
        "found = loaded('datasets', 'pandas', 'pyarrow', 'tensorboard', 'peft', 'gguf', 'torchvision', 'sklearn',\n"
        "               'transformers.models.llama.modeling_llama')\n"
        "assert not found, found\n"
        "assert loaded('lightning') and loaded('torch')\n"  # the test can see what is loaded
    )


def test_the_layers_below_load_what_they_may_and_no_more():
    run(
        LOADED + "import lit_instruct.functional\n"
        "found = loaded('transformers', 'lightning', 'pytorch_lightning')\n"
        "assert not found, found\n"
        "import lit_instruct.rollouts, lit_instruct.rewards, lit_instruct.models.tokenizer\n"
        "found = loaded('lightning', 'pytorch_lightning', 'lit_instruct.modules', 'lit_instruct.data')\n"
        "assert not found, found\n"
        "assert loaded('transformers') and loaded('torch')\n"  # the test can see what is loaded
    )


# -- public names


def names_in(path: str) -> set[str]:
    for node in ast.parse((ROOT / path).read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and name_of(node.targets[0]) == "__all__":
            return set(ast.literal_eval(node.value))
    raise AssertionError(f"{path} has no __all__")


@pytest.mark.parametrize(
    ("path", "names"),
    [
        (
            "lit_instruct/__init__.py",
            "SFTModule RewardModule PPOModule DemonstrationDataModule ComparisonDataModule PromptDataModule "
            "PretrainingDataModule",
        ),
        ("callbacks/__init__.py", "KLMonitor PtxMixing WeightEMA SampleTable"),
        (
            "lit_instruct/functional/__init__.py",
            "masked_moments merge_moments Moments whiten gather_logprobs kl_estimates KLEstimates adaptive_kl_coef "
            "ranking_loss ranking_accuracy next_token_loss token_rewards generalized_advantages clipped_policy_loss "
            "clipped_value_loss cosine_to_floor linear_warmup",
        ),
    ],
)
def test_public_names_stay(path, names):
    assert set(names.split()) <= names_in(path)
