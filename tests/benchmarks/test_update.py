"""The benchmark of an update on a tiny model of the SD3.5 family: it counts what it replays, and its table adds up."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch

from benchmarks import architectures
from benchmarks.bare import Call, RecordedReward, recorded_calls
from benchmarks.update import GPU_PARAMS, Bench, Brightness, measure
from benchmarks.update_tables import Part, methods_of, results_of, tables_of
from sfgrpo.config.stages import PromptsStage, TrainStage, load_config
from sfgrpo.policies.sd3 import SD3Policy
from sfgrpo.prompts import make_prompts
from sfgrpo.runtime.environment import read_environment

TRANSFORMER = architectures.SD35_MEDIUM | {
    "num_layers": 2,
    "num_attention_heads": 1,
    "caption_projection_dim": 64,
    "joint_attention_dim": 256,
    "pooled_projection_dim": 128,
    "sample_size": 8,
    "pos_embed_max_size": 16,
    "dual_attention_layers": (0,),
}
AUTOENCODER = architectures.SD3_AUTOENCODER | {"block_out_channels": (32, 32, 32, 32), "layers_per_block": 1}
GUIDED = Part(stage="update", guidance_scale=4.5, kl_coef=0.04, micro_batch_size=2)


@pytest.fixture(scope="module")
def bench() -> Bench:
    torch.manual_seed(0)
    params = load_config(TrainStage, GPU_PARAMS)
    config = dataclasses.replace(
        params,
        policy=dataclasses.replace(params.policy, dtype="float32"),
        sampling=dataclasses.replace(params.sampling, num_steps=3),
        rollout=dataclasses.replace(params.rollout, prompts_per_update=1, group_size=4, micro_batch_size=4),
        update=dataclasses.replace(params.update, steps_per_update=1, micro_batch_size=2),
    )
    pipeline = architectures.build_sd3(torch.device("cpu"), torch.float32, TRANSFORMER, AUTOENCODER, (64, 64))
    targets = config.policy.lora_targets
    policy = SD3Policy(pipeline, resolution=64, max_sequence_length=4, lora_rank=2, lora_alpha=4, lora_targets=targets)
    pool = make_prompts(load_config(PromptsStage, GPU_PARAMS)).training
    reward = RecordedReward(Brightness())
    return Bench(config=config, policy=policy, reward=reward, prompts=pool[:1] * 4, environment=read_environment())


def test_published_architecture_has_the_published_size():
    with torch.device("meta"):
        transformer = architectures.SD3Transformer2DModel(**architectures.SD35_MEDIUM)
    assert sum(parameter.numel() for parameter in transformer.parameters()) == pytest.approx(2.24e9, rel=0.01)


def test_calls_of_an_update_are_counted_by_what_they_cost(bench):
    bench.run(Part(stage="rollout", guidance_scale=4.5))
    with recorded_calls(bench.policy, bench.reward) as calls:
        bench.run(GUIDED)
    # Two trained steps of three, two micro-batches of two images, both halves of the guidance.
    assert calls == [Call("backward", 4), Call("reference", 4)] * 4
    assert bench.first_ratio[GUIDED.name] < 1e-5


def test_backward_pass_costs_about_two_forward_passes(bench):
    flops = bench.bare().count_flops()
    assert 1.5 * flops["forward"] < flops["backward"] < 3.0 * flops["forward"]
    assert flops["reference"] < flops["forward"]


def test_bare_models_leave_the_policy_as_it_was(bench):
    before = {name: value.clone() for name, value in bench.policy.adapter_parameters().items()}
    bare = bench.bare()
    with bare.adapter_in_dtype():
        bare.run([Call("backward", 1), Call("reference", 1), Call("decode", 1)])
    after = bench.policy.adapter_parameters()
    assert all(torch.equal(after[name], value) and after[name].grad is None for name, value in before.items())


def test_update_is_the_sum_of_its_phases(bench):
    methods = methods_of(bench.config, full_scale=True)
    parts = list(dict.fromkeys(part for method in methods for part in method.parts))
    seen = []
    measure(bench, parts, lambda timings, rounds: seen.append((dict(timings), rounds)), budget_s=0.0)
    ((timings, rounds),) = seen
    assert rounds == 1
    results = json.loads(json.dumps(results_of(timings, methods, 4, ceiling=1e12)))
    stepwise = results["updates"]["Stepwise T'=2, guidance 4.5, KL 0.04, micro-batch 2"]
    assert stepwise["total_s"] == pytest.approx(sum(stepwise["seconds"].values()))
    assert set(stepwise["seconds"]) == {"rollout", "estimates", "decode", "reward", "update"}
    assert stepwise["images_per_s"] == pytest.approx(4 / stepwise["total_s"])
    assert all(row["ours_s"] > 0 for row in results["phases"].values())
    assert tables_of(results).count("\n") == len(results["phases"]) + len(results["updates"]) + 4
