"""The parts of the reproduction: which jobs each is made of."""

from __future__ import annotations

from collections.abc import Callable

from scripts.reproduce_paper.jobs import Job
from scripts.reproduce_paper.plan import KL_COEF, MIDDLE, MODELS, PTX_COEF, World

GRID_SIZES = (2, 4, 9)


def figure1(world: World) -> list[Job]:
    """All models of all sizes."""
    return [world.figure1(model, size) for size in world.scale.sizes for model in MODELS]


def reward_model(world: World) -> list[Job]:
    """Sizes, K, grouped and shuffled, one and two epochs, held-out labelers."""
    return [*reward_sizes(world).values(), *reward_grid(world).values(), *reward_forms(world).values(), world.folds]


def reward_sizes(world: World) -> dict[str, Job]:
    """One reward model a size, on the same rankings."""
    return {size.name: world.reward_model(size) for size in world.scale.sizes}


def reward_grid(world: World) -> dict[str, Job]:
    """Rankings of K responses each: as many responses, as many pairs."""
    names = [f"{form}_k{size}" for size in GRID_SIZES for form in ("completions", "pairs")]
    return {name: world.reward_model(data=name) for name in names if name != "pairs_k2"}  # it is completions_k2


def reward_forms(world: World) -> dict[str, Job]:
    """The same rankings whole and as shuffled pairs."""
    return {
        f"{form}_{epochs}": world.reward_model(data=form, source=world.shuffled, epochs=epochs)
        for form in ("grouped", "pairs")
        for epochs in (1, 2)
    }


def alignment_tax(world: World) -> list[Job]:
    """The models of Figure 1, and the sweeps of both coefficients at the middle size."""
    models = [world.figure1(model, size) for size in world.scale.sizes for model in MODELS if model != "prompted"]
    return [*models, *ptx_sweep(world).values(), *kl_sweep(world).values()]


def ptx_sweep(world: World) -> dict[float, Job]:
    """Coefficient of the pretraining gradients to the measured model; 0 is PPO."""
    found = {0.0: world.figure1("ppo", MIDDLE), PTX_COEF: world.figure1("ppo_ptx", MIDDLE)}
    for coef in world.scale.ptx_coefs:
        found[coef] = world.measured(world.ppo(MIDDLE, ptx=coef), f"ptx{coef:g}")
    return dict(sorted(found.items()))


def kl_sweep(world: World) -> dict[float, Job]:
    """KL coefficient to the measured model, without pretraining gradients."""
    found = {KL_COEF: world.figure1("ppo", MIDDLE)}
    for coef in world.scale.kl_coefs:
        found[coef] = world.measured(world.ppo(MIDDLE, kl=coef), f"kl{coef:g}")
    return dict(sorted(found.items()))


def over_optimisation(world: World) -> list[Job]:
    """Long runs and best-of-n."""
    return [*courses(world).values(), world.best_of_n]


def courses(world: World) -> dict[float, Job]:
    """KL coefficient to scores along a long run."""
    return {kl: world.course(kl) for kl in world.scale.long_kl_coefs}


def generalisation(world: World) -> list[Job]:
    """Owners and a kind of instruction that nobody trained on; manners of users."""
    heldout = [world.figure1(model, MIDDLE) for model in owners(world)]
    return [*heldout, *owners(world).values(), *kinds(world).values(), world.rudeness]


def owners(world: World) -> dict[str, Job]:
    """Models on prompts of training owners that PPO has seen."""
    return {
        model: world.measured(world.trained(model, MIDDLE), model, prompts="known_prompts", loss=False)
        for model in ("sft", "ppo_ptx")
    }


def kinds(world: World) -> dict[str, Job]:
    """Models that never saw one kind of instruction, and those that did, on prompts of that kind."""
    trained = {
        "base": world.base(MIDDLE),
        "sft": world.sft(MIDDLE),
        "ppo_ptx": world.ppo(MIDDLE, ptx=PTX_COEF),
        "sft_without": world.sft(MIDDLE, without_kind=True),
        "ppo_ptx_without": world.ppo(MIDDLE, ptx=PTX_COEF, without_kind=True),
    }
    return {
        name: world.measured(job, name, prompts="only/heldout_prompts", loss=False) for name, job in trained.items()
    }


PARTS: dict[str, Callable[[World], list[Job]]] = {
    "figure1": figure1,
    "reward_model": reward_model,
    "alignment_tax": alignment_tax,
    "over_optimisation": over_optimisation,
    "generalisation": generalisation,
}
"""Name to the jobs of one seed."""
