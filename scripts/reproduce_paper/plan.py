"""Which models are trained and measured: sizes, seeds, settings, and the jobs of each part."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache, cached_property
from importlib.resources import files
from typing import Any, NamedTuple

import yaml

from lit_instruct.toyworld.quickstart import fast_bf16
from lit_instruct.toyworld.world import ToyWorld
from scripts.reproduce_paper import work
from scripts.reproduce_paper.jobs import Job


class Size(NamedTuple):
    """The shape of a model.

    Attributes:
        hidden: width.
        layers: depth.
        heads: of attention.
        intermediate: width of the feed-forward layers.
    """

    hidden: int
    layers: int
    heads: int
    intermediate: int

    @property
    def name(self) -> str:
        """Its folder."""
        return f"d{self.hidden}"


SIZES = (Size(24, 2, 2, 64), Size(48, 3, 4, 128), Size(96, 4, 4, 256), Size(192, 5, 6, 512))
MIDDLE = SIZES[2]
"""One reward model of this size serves all policies, as the paper's of 6B did; sweeps are of this size."""

KL_COEF = 0.2
PTX_COEF = 1.0


@dataclass(frozen=True)
class Scale:
    """How much is computed.

    Attributes:
        seeds: one world each.
        sizes: of the models of Figure 1; the middle size is always there.
        documents: of pretraining text.
        demonstrations: rows.
        prompts: of PPO.
        heldout: prompts that models are compared on, a seed.
        rankings: of the reward model.
        heldout_rankings: that it is measured on.
        shuffled_rankings: of the comparison with shuffled pairs.
        fold_rankings: of the cross-validation over labelers.
        episodes: of PPO.
        long_episodes: of the runs that over-optimise.
        long_every: iterations between two checkpoints of these.
        long_prompts: on which these are measured.
        ptx_coefs: of the sweep, beside ``PTX_COEF`` and 0.
        kl_coefs: of the sweep without pretraining gradients, beside ``KL_COEF``.
        long_kl_coefs: of the long runs.
        best_of: sizes n.
    """

    seeds: tuple[int, ...] = (1, 2, 3)
    sizes: tuple[Size, ...] = SIZES
    documents: int = 20_000
    demonstrations: int = 3_000
    prompts: int = 3_600
    heldout: int = 1_000
    rankings: int = 1_600
    heldout_rankings: int = 400
    shuffled_rankings: int = 300
    fold_rankings: int = 800
    episodes: int = 5_120
    long_episodes: int = 7_680
    long_every: int = 10
    long_prompts: int = 400
    ptx_coefs: tuple[float, ...] = (0.3, 3.0)
    kl_coefs: tuple[float, ...] = (0.8, 3.2)
    long_kl_coefs: tuple[float, ...] = (0.0, 0.2)
    best_of: tuple[int, ...] = (1, 2, 4, 8, 16, 32, 64)


FULL = Scale()
FAST = Scale(
    seeds=(1,),
    sizes=(SIZES[0], MIDDLE),
    documents=8_000,
    prompts=2_000,
    heldout=600,
    rankings=1_000,
    heldout_rankings=200,
    shuffled_rankings=200,
    fold_rankings=300,
    episodes=3_200,
    long_episodes=3_840,
    long_prompts=200,
    ptx_coefs=(),
    kl_coefs=(3.2,),
    long_kl_coefs=(0.0,),
    best_of=(1, 2, 4, 8),
)
LEFT_OUT_KIND = "rewriting"
MODELS = ("base", "prompted", "sft", "ppo", "ppo_ptx")


@dataclass(frozen=True)
class World:
    """The jobs of one seed.

    Attributes:
        seed: of the world, and of all that is drawn.
        scale: how much.
    """

    seed: int
    scale: Scale
    _jobs: dict[str, Job] = field(default_factory=dict, compare=False, repr=False)

    @cached_property
    def world(self) -> ToyWorld:
        """Its facts."""
        return ToyWorld(self.seed)

    def _job(self, folder: str, done_by: Callable[..., Any], needs: Sequence[Job], /, **arguments: Any) -> Job:
        folder = f"seed{self.seed}/{folder}"
        if folder not in self._jobs:
            self._jobs[folder] = Job(folder, done_by, arguments, tuple(needs))
        return self._jobs[folder]

    @cached_property
    def data(self) -> Job:
        """All texts."""
        scale = self.scale
        return self._job(
            "data",
            work.write_data,
            (),
            seed=self.seed,
            documents=scale.documents,
            demonstrations=scale.demonstrations,
            prompts=scale.prompts,
            heldout=scale.heldout,
            left_out_kind=LEFT_OUT_KIND,
        )

    def _train(self, name: str, stage: str, config: dict[str, Any], needs: Sequence[Job]) -> Job:
        return self._job(name, work.train, needs, stage=stage, config=config)

    def base(self, size: Size) -> Job:
        """A language model of plain text."""
        config = shipped("base", self.seed)
        config["trainer"]["precision"] = fast_precision()
        config["model"]["base"].update(
            hidden_size=size.hidden,
            intermediate_size=size.intermediate,
            num_hidden_layers=size.layers,
            num_attention_heads=size.heads,
            num_key_value_heads=size.heads,
            initializer_range=round(0.9 / size.hidden**0.5, 4),
        )
        config["model"]["tokenizer"] = "../../data/tokenizer"
        config["model"]["learning_rate"] = scaled(3e-3, size)
        # Twice as long as the quickstart's: the prompted model reads examples before its prompt.
        config["data"].update(text="../../data/pretraining.jsonl", chunk_tokens=128, batch_size=32)
        return self._train(f"{size.name}/base", "pretrain", config, (self.data,))

    def sft(self, size: Size, *, without_kind: bool = False) -> Job:
        """Imitates demonstrations."""
        base = self.base(size)
        config = shipped("sft", self.seed)
        config["trainer"]["precision"] = fast_precision()
        config["trainer"]["callbacks"][0]["init_args"]["text"] = "../../data/pretraining.jsonl"
        config["model"].update(base="../base/last.ckpt", learning_rate=scaled(1e-3, size))
        folder = "without/" if without_kind else ""
        config["data"]["demonstrations"] = f"../../data/{folder}demonstrations.jsonl"
        name = "sft_without" if without_kind else "sft"
        return self._train(f"{size.name}/{name}", "sft", config, (self.data, base))

    @cached_property
    def rankings(self) -> Job:
        """Rankings of responses of all sizes' SFT models."""
        writers = [self.sft(size) for size in self.scale.sizes]
        return self._job(
            "rankings",
            work.rank,
            (self.data, *writers),
            seed=self.seed,
            data="../data",
            writers=[f"../{size.name}/sft" for size in self.scale.sizes],
            train_prompts=self.scale.rankings,
            heldout_prompts=self.scale.heldout_rankings,
        )

    def reward_config(self, size: Size, comparisons: str, *, heldout: str | None = None) -> dict[str, Any]:
        """The settings of a reward model."""
        config = shipped("rm", self.seed)
        config["trainer"].update(precision=fast_precision(), num_sanity_val_steps=0)
        config["model"].update(base="../sft/last.ckpt", learning_rate=scaled(1e-3, size))
        config["data"].update(
            comparisons=comparisons,
            demonstrations="../../data/demonstrations.jsonl",
            val=heldout or "../../rankings/heldout.jsonl",
        )
        return config

    def reward_model(
        self,
        size: Size = MIDDLE,
        data: str = "comparisons",
        *,
        epochs: int = 1,
        source: Job | None = None,
        base: Job | None = None,
        name: str | None = None,
    ) -> Job:
        """A reward model, of the usual rankings or of others."""
        rankings = source or self.rankings
        sft = base or self.sft(size)
        name = name or (f"rm_{data}" if data != "comparisons" else "rm")
        name += f"_{epochs}epochs" if epochs > 1 else ""
        config = self.reward_config(size, f"../../{'/'.join(rankings.name.split('/')[1:])}/{data}.jsonl")
        config["model"]["base"] = f"../{sft.name.split('/')[-1]}/last.ckpt"
        config["trainer"]["max_epochs"] = epochs
        needs = (self.data, self.rankings, rankings, sft)
        if data == "pairs":
            return self._job(
                f"{size.name}/{name}", work.train_on_pairs, needs, shuffled="../../shuffled", config=config
            )
        return self._train(f"{size.name}/{name}", "rm", config, needs)

    def _some_rankings(self, name: str, count: int) -> Job:
        """The first of the rankings whole, and as shuffled pairs."""
        return self._job(
            name,
            work.shuffle_pairs,
            (self.rankings,),
            comparisons="../rankings/comparisons.jsonl",
            rankings=count,
            prompts_a_step=shipped("rm", self.seed)["data"]["batch_size"],
        )

    @cached_property
    def shuffled(self) -> Job:
        """Data of the comparison of whole rankings and shuffled pairs."""
        return self._some_rankings("shuffled", self.scale.shuffled_rankings)

    @cached_property
    def folds(self) -> Job:
        """Cross-validation over labelers."""
        rankings = self._some_rankings("fold_rankings", self.scale.fold_rankings)
        config = self.reward_config(MIDDLE, "../../fold_rankings/grouped.jsonl")
        config["model"]["base"] = "../sft/last.ckpt"
        config["data"].pop("val")
        return self._job(
            f"{MIDDLE.name}/folds",
            work.fold_labelers,
            (self.data, rankings, self.sft(MIDDLE)),
            config=config,
        )

    def ppo(
        self,
        size: Size,
        *,
        ptx: float = 0.0,
        kl: float = KL_COEF,
        long: bool = False,
        without_kind: bool = False,
    ) -> Job:
        """PPO, with pretraining gradients if ``ptx`` is not 0."""
        sft = self.sft(size, without_kind=without_kind)
        reward = self.reward_model_without if without_kind else self.reward_model()
        config = shipped("ppo_ptx" if ptx else "ppo", self.seed)
        config["model"]["seed"] = self.seed
        config["trainer"].update(val_check_interval=None, limit_val_batches=0)
        silent = ("RolloutProgressBar", "SampleTable")
        config["trainer"]["callbacks"] = [
            callback for callback in config["trainer"]["callbacks"] if not callback["class_path"].endswith(silent)
        ]
        for callback in config["trainer"]["callbacks"]:
            arguments = callback.get("init_args", {})
            if callback["class_path"].endswith("PtxMixing"):
                arguments.update(text="../../data/pretraining.jsonl", coef=ptx)
            if long and callback["class_path"].endswith("ModelCheckpoint"):
                steps = config["data"]["batch_size"] // config["model"]["minibatch_size"]
                arguments.update(
                    save_top_k=-1,
                    every_n_train_steps=steps * self.scale.long_every,
                    filename="{step}",
                    save_weights_only=True,
                )
        config["model"].update(
            policy=f"../{sft.name.split('/')[-1]}/last.ckpt",
            reward_model=f"../../{'/'.join(reward.name.split('/')[1:])}/last.ckpt",
            kl_coef=kl,
            episodes=self.scale.long_episodes if long else self.scale.episodes,
            learning_rate=scaled(1e-4, size),
        )
        config["data"]["prompts"] = f"../../data/{'without/' if without_kind else ''}prompts.jsonl"
        name = f"ppo{f'_ptx{ptx:g}' if ptx else ''}_kl{kl:g}{'_long' if long else ''}"
        name += "_without" if without_kind else ""
        return self._train(f"{size.name}/{name}", "ppo", config, (self.data, sft, reward))

    @cached_property
    def rankings_without(self) -> Job:
        """The rankings without one kind of instruction."""
        return self._job(
            "rankings_without",
            work.without_kind,
            (self.rankings,),
            comparisons="../rankings/comparisons.jsonl",
            kind=LEFT_OUT_KIND,
        )

    @cached_property
    def reward_model_without(self) -> Job:
        """A reward model that never saw one kind of instruction, nor did the model it starts from."""
        return self.reward_model(
            source=self.rankings_without, base=self.sft(MIDDLE, without_kind=True), name="rm_without"
        )

    def trained(self, model: str, size: Size) -> Job:
        """The job whose checkpoint a model of Figure 1 is."""
        if model in {"base", "prompted"}:
            return self.base(size)
        return {"sft": self.sft(size), "ppo": self.ppo(size), "ppo_ptx": self.ppo(size, ptx=PTX_COEF)}[model]

    def prefix(self, size: Size) -> Job:
        """The few-shot prefix of the prompted model."""
        base, reward = self.base(size), self.reward_model()
        return self._job(
            f"{size.name}/prefix",
            work.choose_prefix,
            (self.data, base, reward),
            seed=self.seed,
            model="../base",
            reward_model=f"../../{MIDDLE.name}/rm",
            prompts="../../data/known_prompts.jsonl",
            examples=[1, 2, 4, 4],
        )

    def measured(
        self,
        trained: Job,
        name: str,
        *,
        prompts: str = "heldout_prompts",
        loss: bool = True,
        prefix: Job | None = None,
        template: str = "auto",
    ) -> Job:
        """Gold scores of a model, its KL to the SFT model of its size, and what it lost."""
        size = trained.name.split("/")[1]
        sft = next(self.sft(each) for each in SIZES if each.name == size)
        needs = [self.data, trained, sft] + ([prefix] if prefix else [])
        suffix = "" if prompts == "heldout_prompts" else "_" + prompts.replace("/", "_")
        return self._job(
            f"{size}/measured/{name}{suffix}",
            work.measure,
            needs,
            seed=self.seed,
            name=name,
            model=f"../../{trained.name.split('/')[-1]}",
            reference="../../sft",
            prompts=f"../../../data/{prompts}.jsonl",
            template=template,
            tax="../../../data/tax" if loss and size == MIDDLE.name else None,
            text="../../../data/pretraining_heldout.jsonl" if loss else None,
            prefix_from="../../prefix" if prefix else None,
        )

    def figure1(self, model: str, size: Size) -> Job:
        """A model of Figure 1, measured."""
        return self.measured(
            self.trained(model, size),
            model,
            loss=model != "prompted",
            prefix=self.prefix(size) if model == "prompted" else None,
            template="verbatim" if model in {"base", "prompted"} else "auto",
        )

    def course(self, kl: float) -> Job:
        """Proxy and gold score along a long run."""
        run = self.ppo(MIDDLE, kl=kl, long=True)
        return self._job(
            f"{MIDDLE.name}/course_kl{kl:g}",
            work.measure_course,
            (self.data, run, self.reward_model(), self.sft(MIDDLE)),
            seed=self.seed,
            run=f"../{run.name.split('/')[-1]}",
            reward_model="../rm",
            reference="../sft",
            prompts="../../data/heldout_prompts.jsonl",
            max_prompts=self.scale.long_prompts,
        )

    @cached_property
    def best_of_n(self) -> Job:
        """Best-of-n of the SFT model by the reward model."""
        return self._job(
            f"{MIDDLE.name}/best_of_n",
            work.best_of_n,
            (self.data, self.reward_model(), self.sft(MIDDLE)),
            seed=self.seed,
            model="../sft",
            reward_model="../rm",
            prompts="../../data/heldout_prompts.jsonl",
            max_prompts=self.scale.long_prompts,
            sizes=list(self.scale.best_of),
        )

    @cached_property
    def rudeness(self) -> Job:
        """How rude models are to users of different manners."""
        models = {model: self.trained(model, MIDDLE) for model in ("base", "sft", "ppo", "ppo_ptx")}
        return self._job(
            f"{MIDDLE.name}/rudeness",
            work.rudeness,
            (self.data, *models.values()),
            seed=self.seed,
            models={model: f"../{job.name.split('/')[-1]}" for model, job in models.items()},
            prompts="../../data/heldout_prompts.jsonl",
            max_prompts=self.scale.heldout,
        )


def shipped(name: str, seed: int) -> dict[str, Any]:
    """The quickstart's configuration of a stage, to write into the job's own folder, silent."""
    config: dict[str, Any] = {"seed_everything": seed, "machine": {"threads": 1}, **copy.deepcopy(_quickstart(name))}
    config["trainer"]["enable_progress_bar"] = False
    config["trainer"]["logger"]["init_args"]["save_dir"] = "."
    config["data"]["seed"] = seed
    for callback in config["trainer"]["callbacks"]:
        if callback["class_path"].endswith("ModelCheckpoint"):
            callback["init_args"]["dirpath"] = "."
    return config


@cache
def _quickstart(name: str) -> dict[str, Any]:
    text = (files("lit_instruct") / "configs" / "quickstart" / f"{name}.yaml").read_text(encoding="utf-8")
    config: dict[str, Any] = yaml.safe_load(text)
    return config


def scaled(rate: float, size: Size) -> float:
    """A learning rate of the quickstart's model (width 128), larger for narrower models."""
    return float(f"{rate * 128 / size.hidden:.3g}")


def fast_precision() -> str:
    """bf16 where the processor has it; PPO always keeps 32 bit."""
    return "bf16-mixed" if fast_bf16() else "32-true"
