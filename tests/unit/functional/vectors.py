"""Hand-checked cases with ten significant digits, computed in fp64 by code that shares nothing with the package.

Each case holds its inputs and, under ``expected``, the results. Those named ``wrong_*`` are what a known mistake gives.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

VECTORS: dict[str, dict[str, Any]] = {
    "rm_ranking_loss_K4_no_ties": {
        "scores": [1.2, 0.3, 0.5, -0.7],
        "ranks": [1, 2, 3, 4],
        "expected": {
            "n_pairs": 6,
            "pair_order": [[0, 1], [0, 2], [0, 3], [1, 2], [1, 3], [2, 3]],
            "pair_losses": [0.3411538747, 0.4031860489, 0.1393867583, 0.7981388694, 0.3132616875, 0.2632824673],
            "loss": 0.3764016177,
            "grad_scores": [-0.1251618666, -0.08828748688, 0.1083618348, 0.1050875187],
            "accuracy": 0.8333333333,
        },
    },
    "rm_ranking_loss_K4_one_tie_dropped": {
        "scores": [1.2, 0.3, 0.5, -0.7],
        "ranks": [1, 2, 2, 3],
        "expected": {
            "n_pairs_retained": 5,
            "loss_default_mean_over_retained": 0.2920541674,
            "loss_literal_divide_by_K_choose_2": 0.2433784728,
            "accuracy": 1.0,
        },
    },
    "rm_batch_loss_mixed_K_prompt_weighting": {
        "scores": [[2.0, 1.0, 0.0, -1.0], [0.4, 0.1], [0.5, 0.5, 0.2]],
        "ranks": [[1, 2, 3, 4], [2, 1], [1, 1, 1]],
        "expected": {
            "per_prompt_loss": [0.2070380727, 0.8543552445, None],
            "loss": 0.5306966586,
            "wrong_flat_pair_mean": 0.2995119544,
            "accuracy_pair_pooled": 0.8571428571,
            "accuracy_prompt_mean": 0.5,
        },
    },
    "rm_equal_scores_loss_and_accuracy": {
        "scores": [0.3, 0.3, 0.3, 0.3],
        "ranks": [1, 2, 3, 4],
        "expected": {"loss": 0.6931471806, "accuracy_strict": 0.0, "accuracy_half_credit": 0.5},
    },
    "rm_bias_normalisation_on_demonstrations": {
        "raw_demo_scores": [3.1, 2.2, 4.0, 2.7],
        "raw_scores": [5.0, 1.5, 2.9],
        "expected": {
            "bias": 3.0,
            "normalised_demo_scores": [0.1, -0.8, 1.0, -0.3],
            "normalised_scores": [2.0, -1.5, -0.1],
        },
    },
    "rm_calibration_ece_brier": {
        "score_differences": [2.0, 1.0, 0.5, 0.1, -0.3, -1.5],
        "bin_edges": [0.5, 0.6, 0.7, 0.8, 0.9, 1.0],
        "expected": {
            "p_preferred": [0.880797078, 0.7310585786, 0.6224593312, 0.5249791875, 0.4255574832, 0.1824255238],
            "log_loss": 0.6857386442,
            "brier": 0.2421887972,
            "accuracy": 0.6666666667,
            "ece": 0.2407125581,
            "bins_lo_hi_count_conf_acc": [
                [0.5, 0.6, 2, 0.5497108521, 0.5],
                [0.6, 0.7, 1, 0.6224593312, 1.0],
                [0.7, 0.8, 1, 0.7310585786, 1.0],
                [0.8, 0.9, 2, 0.8491857771, 0.5],
            ],
        },
    },
    "rm_last_token_index_right_padding": {
        "input_ids": [[5, 6, 7, 2, 0, 0], [5, 6, 7, 8, 9, 2], [5, 6, 2, 0, 0, 0]],
        "pad_id": 0,
        "eos_id": 2,
        "attention_mask": [[1, 1, 1, 1, 0, 0], [1, 1, 1, 1, 1, 1], [1, 1, 1, 0, 0, 0]],
        "expected": {"index": [3, 5, 2], "wrong_index_if_eos_counted_as_pad": [2, 4, 1]},
    },
    "logprob_gather_off_by_one": {
        "logits": [
            [0.0, 1.0, 2.0, -1.0],
            [1.0, 0.0, 0.5, 0.2],
            [2.0, -1.0, 0.0, 0.3],
            [0.1, 0.4, -0.2, 1.5],
            [0.0, 0.0, 3.0, 0.0],
        ],
        "tokens": [1, 3, 2, 0, 2],
        "prompt_length": 2,
        "expected": {
            "response_logprobs": [-1.385311416, -0.3132079054, -2.266535546],
            "wrong_unshifted": [-2.313207905, -1.966535546, -0.1392063142],
            "entropy": [1.310525482, 0.8473434691, 1.146483349],
            "response_logprobs_temperature_0p7": [-1.431197884, -0.1478673484, -2.787116934],
        },
    },
    "token_rewards_with_kl_and_terminal_score": {
        "logprobs": [[-1.0, -0.5, -2.0, -0.3, 0.0], [-0.7, -1.1, -0.2, -0.9, -1.4]],
        "ref_logprobs": [[-1.2, -0.4, -2.5, -0.3, 0.0], [-0.9, -1.0, -0.6, -1.3, -1.0]],
        "mask": [[1, 1, 1, 1, 0], [1, 1, 1, 1, 1]],
        "scores": [1.5, -0.4],
        "beta": 0.02,
        "expected": {
            "kl_k1_per_token": [[0.2, -0.1, 0.5, 0.0, 0.0], [0.2, -0.1, 0.4, 0.4, -0.4]],
            "non_score_reward": [[-0.004, 0.002, -0.01, 0.0, 0.0], [-0.004, 0.002, -0.008, -0.008, 0.008]],
            "rewards": [[-0.004, 0.002, -0.01, 1.5, 0.0], [-0.004, 0.002, -0.008, -0.008, -0.392]],
            "sequence_kl": [0.6, 0.5],
            "objective_kl": 0.55,
            "rlhf_reward": [1.488, -0.41],
            "mean_rlhf_reward": 0.539,
        },
    },
    "missing_eos_score_rules": {
        "scores": [1.5, -0.4, 2.0],
        "contains_eos": [True, False, False],
        "expected": {"paper": [1.5, -0.4, 2.0], "replace": [1.5, -1.0, -1.0], "subtract": [1.5, -1.4, 1.0]},
    },
    "gae_masked_unequal_lengths_lambda_0p95": {
        "rewards": [[-0.004, 0.002, -0.01, 1.5, 0.0], [-0.004, 0.002, -0.008, -0.008, -0.392]],
        "values": [[0.5, 0.6, 0.8, 1.0, 9.9], [-0.2, -0.1, 0.0, -0.3, -0.5]],
        "mask": [[1, 1, 1, 1, 0], [1, 1, 1, 1, 1]],
        "gamma": 1.0,
        "lam": 0.95,
        "expected": {
            "advantages": [[0.8880625, 0.83375, 0.665, 0.5, 0.0], [-0.175437325, -0.2857235, -0.40813, -0.1054, 0.108]],
            "returns": [[1.3880625, 1.43375, 1.465, 1.5, 0.0], [-0.375437325, -0.3857235, -0.40813, -0.4054, -0.392]],
        },
    },
    "gae_lambda_1_equals_reward_to_go_minus_value": {
        "rewards": [[-0.004, 0.002, -0.01, 1.5, 0.0], [-0.004, 0.002, -0.008, -0.008, -0.392]],
        "values": [[0.5, 0.6, 0.8, 1.0, 9.9], [-0.2, -0.1, 0.0, -0.3, -0.5]],
        "mask": [[1, 1, 1, 1, 0], [1, 1, 1, 1, 1]],
        "gamma": 1.0,
        "lam": 1.0,
        "expected": {
            "advantages": [[0.988, 0.892, 0.69, 0.5, 0.0], [-0.21, -0.306, -0.408, -0.1, 0.108]],
            "returns": [[1.488, 1.492, 1.49, 1.5, 0.0], [-0.41, -0.406, -0.408, -0.4, -0.392]],
        },
    },
    "masked_whitening_shift_mean_true": {
        "x": [[0.8880625, 0.83375, 0.665, 0.5, 0.0], [-0.175437325, -0.2857235, -0.40813, -0.1054, 0.108]],
        "mask": [[1, 1, 1, 1, 0], [1, 1, 1, 1, 1]],
        "eps": 1e-08,
        "expected": {
            "mean": 0.2244579639,
            "var_population": 0.2249273443,
            "whitened": [
                [1.399227102, 1.28470781, 0.9288941274, 0.580987416, 0.0],
                [-0.8431894235, -1.075730638, -1.333827868, -0.6955139361, -0.2455545893],
            ],
            "whitened_unbiased": [
                [1.319203966, 1.211234142, 0.8757697842, 0.5477601902, 0.0],
                [-0.7949666142, -1.014208575, -1.257544977, -0.6557368291, -0.2315110876],
            ],
            "wrong_mask_ignored": [
                [1.508007104, 1.388622808, 1.017693466, 0.6550069973, -0.4440429065],
                [-0.8296716568, -1.072091677, -1.341153381, -0.6757226262, -0.2066481273],
            ],
        },
    },
    "masked_whitening_shift_mean_false_for_rewards": {
        "x": [[-0.004, 0.002, -0.01, 1.5, 0.0], [-0.004, 0.002, -0.008, -0.008, -0.392]],
        "mask": [[1, 1, 1, 1, 0], [1, 1, 1, 1, 1]],
        "eps": 1e-08,
        "expected": {
            "mean": 0.1197777778,
            "var_population": 0.2527568395,
            "whitened": [
                [-0.1264240171, -0.1144896392, -0.1383583949, 2.865126697, 0.0],
                [-0.1264240171, -0.1144896392, -0.134380269, -0.134380269, -0.8981804512],
            ],
        },
    },
    "ppo_policy_loss_clipped_masked": {
        "new_logprobs": [[-0.7, -0.6, -1.6, -0.35, 5.0], [-1.0, -0.8, -0.25, -0.9, -1.3]],
        "old_logprobs": [[-1.0, -0.5, -2.0, -0.3, 0.0], [-0.7, -1.1, -0.2, -0.9, -1.4]],
        "advantages": [
            [1.399227102, 1.28470781, 0.9288941274, 0.580987416, 0.0],
            [-0.8431894235, -1.075730638, -1.333827868, -0.6955139361, -0.2455545893],
        ],
        "mask": [[1, 1, 1, 1, 0], [1, 1, 1, 1, 1]],
        "clip": 0.2,
        "expected": {
            "ratio": [
                [1.349858808, 0.904837418, 1.491824698, 0.9512294245, 0.0],
                [0.7408182207, 1.349858808, 0.9512294245, 1.0, 1.105170918],
            ],
            "loss": -0.0162826045,
            "clipfrac": 0.3333333333,
            "ratio_mean": 1.093869747,
            "approx_kl_k1": -0.06666666667,
            "approx_kl_k2": 0.02527777778,
            "approx_kl_k3": 0.02720307984,
            "grad_new_logprobs": [
                [0.0, -0.1291612997, 0.0, -0.06140581393, 0.0],
                [0.0, 0.1613427196, 0.1409751461, 0.07727932623, 0.0301533101],
            ],
        },
    },
    "ppo_clip_sign_table": {
        "clip": 0.2,
        "expected": {
            "rows": [
                [1.0, 0.5, -0.5, -0.5],
                [1.0, 0.9, -0.9, -0.9],
                [1.0, 1.1, -1.1, -1.1],
                [1.0, 1.5, -1.2, 0.0],
                [-1.0, 0.5, 0.8, 0.0],
                [-1.0, 0.9, 0.9, 0.9],
                [-1.0, 1.1, 1.1, 1.1],
                [-1.0, 1.5, 1.5, 1.5],
            ]
        },
    },
    "ppo_value_loss_clipped_masked": {
        "new_values": [[0.9, 0.5, 1.3, 1.1, -7.0], [-0.3, 0.3, 0.1, -0.6, -0.4]],
        "old_values": [[0.5, 0.6, 0.8, 1.0, 9.9], [-0.2, -0.1, 0.0, -0.3, -0.5]],
        "returns": [[1.3880625, 1.43375, 1.465, 1.5, 0.0], [-0.375437325, -0.3857235, -0.40813, -0.4054, -0.392]],
        "mask": [[1, 1, 1, 1, 0], [1, 1, 1, 1, 1]],
        "clip": 0.2,
        "expected": {
            "loss": 0.1385322684,
            "loss_unclipped": 0.1149642129,
            "clipfrac": 0.2222222222,
            "explained_variance": 0.6710077725,
        },
    },
    "kl_estimators_three_outcome_distribution": {
        "q": [0.5, 0.3, 0.2],
        "p": [0.4, 0.4, 0.2],
        "expected": {
            "exact_kl_q_p": 0.02526715392,
            "k1_per_outcome": [0.2231435513, -0.2876820725, 0.0],
            "k2_per_outcome": [0.02489652225, 0.04138048741, 0.0],
            "k3_per_outcome": [0.02314355131, 0.04565126088, 0.0],
            "E_k1": 0.02526715392,
            "E_k2": 0.02486240734,
            "E_k3": 0.02526715392,
            "std_k1": 0.2215544755,
            "std_k2": 0.01433466192,
            "std_k3": 0.01595600835,
            "reverse_kl_p_q": 0.02581540846,
        },
    },
    "adaptive_kl_controller_steps": {
        "beta0": 0.15,
        "target": 6.0,
        "kl_sequence": [0.5, 3.0, 6.0, 6.6, 9.0, 30.0],
        "n_episodes": 512,
        "horizon": 10000,
        "K_beta": 0.1,
        "expected": {
            "beta_after_each_step_code": [
                0.148464,
                0.1469437286,
                0.1469437286,
                0.1476960805,
                0.1492084884,
                0.1507363833,
            ],
            "beta_after_each_step_paper": [0.147, 0.14406, 0.14406, 0.1455006, 0.148410612, 0.1513788242],
            "error": [-0.2, -0.2, 0.0, 0.1, 0.2, 0.2],
        },
    },
    "lr_sft_cosine_to_10_percent": {
        "peak": 9.65e-06,
        "floor_ratio": 0.1,
        "total_steps": 6368,
        "steps": [0, 1, 1592, 3184, 4776, 6367, 6368],
        "expected": {
            "lr": [9.65e-06, 9.649999472e-06, 8.378111197e-06, 5.3075e-06, 2.236888803e-06, 9.650005284e-07, 9.65e-07]
        },
    },
    "lr_rm_cosine_to_10_percent": {
        "peak": 9e-06,
        "floor_ratio": 0.1,
        "total_steps": 519,
        "steps": [0, 100, 259, 400, 519],
        "expected": {"lr": [9e-06, 8.280404267e-06, 4.96225764e-06, 1.906059252e-06, 9e-07]},
    },
    "lr_ppo_warmup_ten_iterations_from_one_tenth": {
        "iterations": [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12],
        "expected": {
            "variant_A": [0.1, 0.19, 0.28, 0.37, 0.46, 0.55, 0.64, 0.73, 0.82, 0.91, 1.0, 1.0, 1.0],
            "variant_B": [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0, 1.0, 1.0, 1.0],
        },
    },
    "ema_weights_decay_0p992": {
        "decay": 0.992,
        "ema0": 0.0,
        "weights": [1.0, 1.0, 2.0, 3.0],
        "expected": {
            "ema": [0.008, 0.015936, 0.031808512, 0.0555540439],
            "residual_initial_after_125": 0.3664029986,
            "residual_initial_after_500": 0.01802337327,
            "residual_initial_after_4000": 1.113495886e-14,
            "half_life_updates": 86.29636002,
        },
    },
    "ptx_sign_and_gradient_accumulation": {
        "theta": 0.5,
        "gamma": 27.8,
        "n_ptx_microbatches": 8,
        "expected": {
            "ppo_loss": 2.25,
            "nll": 1.125,
            "total_loss": 33.525,
            "grad_ppo": -3.0,
            "grad_ptx_unscaled": -0.5,
            "grad_total": -16.9,
            "grad_per_ptx_microbatch": -1.7375,
            "wrong_grad_if_minus_sign": 10.9,
        },
    },
    "rl_run_bookkeeping_256k_episodes": {
        "episodes": 256000,
        "batch": 512,
        "minibatch": 64,
        "inner_epochs": 1,
        "ptx_ratio": 8,
        "unique_prompts": 31144,
        "expected": {
            "iterations": 500,
            "minibatches_per_iteration": 8,
            "optimiser_steps": 4000,
            "ptx_examples_total": 2048000,
            "ptx_examples_per_iteration": 4096,
            "ptx_examples_per_minibatch": 512,
            "visits_per_prompt": 8.219881839,
        },
    },
    "sft_loss_completion_mask_token_mean": {
        "target_probs": [[0.5, 0.25, 0.1, 0.8], [0.9, 0.3, 0.6, 0.2]],
        "completion_mask": [[0, 1, 1, 1], [0, 0, 1, 1]],
        "expected": {"token_mean": 1.206457308, "sequence_mean": 1.182069718, "with_prompt": 1.00434588},
    },
}


def f64(values: Any) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def mask(values: Any) -> Tensor:
    return torch.tensor(values, dtype=torch.bool)
