"Any flow pipeline is a policy: what it gives is what its pipeline gives, and all of training works with it."
import json
import re

import pytest
import torch
from parity import PROMPTS, ask, brightness, differences, general_policy, inputs, load_loras, moved, train, velocity
from torch.testing import assert_close

from egrpo.core.plan import gradient_nfe, rollout_nfe
from egrpo.core.rollout import rollout
from egrpo.methods.registry import make_plan
from egrpo.models.general import GeneralPolicy
from egrpo.models.lora import lora_layers
from egrpo.models.pipeline import NetworkPair
from egrpo.models.policy import load_policy, model_sigmas
from egrpo.rewards.reward import score
from egrpo.testing.pipelines import NEWER, small_pipeline

pytestmark = pytest.mark.filterwarnings('ignore')
THREE = 'flux2-dev', 'qwen-image', 'z-image'


@pytest.mark.parametrize('name', THREE)
def test_parity(name):
    found = ask(name)
    assert found.velocity == found.images == found.lora == 0
    assert found.ratio_error < 1e-6 and found.lora_moved > 1e-2


def test_every_family_names_layers_for_a_lora():
    for name in NEWER:
        layers = lora_layers(small_pipeline(name).transformer)
        assert len(layers) >= 8 and not [n for n in layers if re.search('norm|mod', n)], name


@pytest.mark.parametrize('name', ['qwen-image', 'z-image', 'chroma'])
def test_rows_do_not_depend_on_their_neighbours(name):
    policy = general_policy(name)
    x, levels, cond = inputs(policy)
    alone = torch.cat([velocity(policy, x[i:i+1], levels[i:i+1], cond[[i]]) for i in range(4)])
    together = velocity(policy, x, levels, cond)
    policy.micro_batch = 3
    assert_close(together, alone, atol=1e-5, rtol=0)
    assert_close(velocity(policy, x, levels, cond), alone, atol=1e-5, rtol=0)


@pytest.mark.parametrize('name', ['flux2-dev', 'chroma'])
def test_evaluations_are_counted_as_predicted(name):
    policy, rows = general_policy(name), []
    policy.transformer.register_forward_hook(lambda module, inputs, out: rows.append(len(out[0])))
    plan = make_plan('egrpo', num_steps=4, num_generations=3, active_steps=2)
    out = rollout(policy, policy.encode(PROMPTS), plan, 0, 0)
    assert policy.nfe == sum(rows) == 2 * policy.nfe_per_velocity * rollout_nfe(plan)
    assert len(out.parents) == 2 * gradient_nfe(plan)
    with policy.unguided(): # a first time it is found out how
        rows.clear()
        velocity(policy)
    assert sum(rows) == 4


@pytest.mark.parametrize('name', ['z-image', 'sana'])
def test_random_numbers_of_others_are_not_used(name):
    before = torch.get_rng_state()
    policy = general_policy(name)
    policy.decode(velocity(policy))
    policy.sigmas(4)
    assert torch.equal(torch.get_rng_state(), before)


def test_embeddings_are_kept_and_encoders_dropped(tmp_path):
    policy = general_policy('qwen-image', text_encoders='drop', embeddings=tmp_path)
    expected = velocity(policy)
    policy.drop_text_encoders([*PROMPTS, 'a cat'])
    assert policy.pipeline.text_encoder is None and len([*tmp_path.iterdir()]) == 3
    assert torch.equal(velocity(policy), expected)
    assert policy.decode(expected).shape == (4, 3, 32, 32)
    with pytest.raises(ValueError, match="'a dog' was not embedded"): policy.encode(['a dog'])


@pytest.mark.parametrize('name', ['flux2-klein', 'z-image'])
def test_a_whole_network_and_its_reference(name):
    policy = general_policy(name, lora_rank=0)
    policy.freeze_reference()
    before = velocity(policy)
    moved(policy)
    assert (velocity(policy) - before).abs().max() > 1e-2
    with policy.reference(): assert torch.equal(velocity(policy), before)


def test_gradient_checkpointing_changes_nothing():
    def gradient(**how):
        policy = moved(general_policy('z-image', lora_rank=2, **how))
        policy.velocity(*inputs(policy)).square().mean().backward()
        return torch.cat([p.grad.flatten() for p in policy.parameters().values() if p.grad is not None])
    assert_close(gradient(gradient_checkpointing=True), gradient(), atol=1e-6, rtol=1e-4)


def test_gradient_checkpointing_that_changes_something_is_refused():
    "Chroma's single blocks are not given the mask then (diffusers 0.42.1)."
    with pytest.raises(ValueError, match='gradient_checkpointing changes what this network computes'):
        general_policy('chroma', lora_rank=2, gradient_checkpointing=True)


@pytest.mark.parametrize('dtype', ['bf16', 'fp16'])
@pytest.mark.parametrize('name', ['qwen-image', 'z-image', 'wan2.1'])
def test_low_precision(name, dtype):
    exact = general_policy(name)
    call = exact.call or dict(max_sequence_length=exact.text_length) # not the class of its own
    policy = load_policy(small_pipeline(name), 'cpu', dtype, 2, resolution=32, guidance=3., call=call)
    expected = velocity(exact)
    assert_close(velocity(policy), expected, atol=.05 * expected.abs().max().item(), rtol=0)
    policy.velocity(*inputs(policy)).square().mean().backward()
    gradients = [p.grad for p in policy.parameters().values() if p.grad is not None] # the last block's text goes nowhere
    assert len(gradients) > 8 and all(g.isfinite().all() for g in gradients)
    assert policy.decode(inputs(policy)[0]).isfinite().all()


def test_resumed_equals_straight(tmp_path):
    (tmp_path/'a').mkdir()
    (tmp_path/'b').mkdir()
    straight = train(general_policy('chroma', lora_rank=2), tmp_path/'a', 2)
    train(general_policy('chroma', lora_rank=2), tmp_path/'b', 1, checkpoint_every=1)
    resumed = train(general_policy('chroma', lora_rank=2), tmp_path/'b', 2, resume=True)
    for name, p in straight.parameters.items(): assert torch.equal(p, resumed.parameters[name])


def test_from_a_folder(tmp_path):
    "A folder is loaded as a policy; its schedule is known before; a LoRA of it is the start of another run."
    small_pipeline('chroma').save_pretrained(tmp_path/'model')
    policy = moved(load_policy(str(tmp_path/'model'), 'cpu', lora_rank=2, guidance=3.))
    assert isinstance(policy, GeneralPolicy) and policy.resolution == 32
    assert torch.equal(model_sigmas(str(tmp_path/'model'), 4), policy.sigmas(4))
    policy.save(tmp_path/'lora')
    again = load_policy(str(tmp_path/'model'), 'cpu', lora_from=tmp_path/'lora', guidance=3.)
    assert torch.equal(velocity(again), velocity(policy))


def test_two_networks_are_trained(tmp_path):
    policy = general_policy('wan2.2', lora_rank=2)
    assert isinstance(policy.transformer, NetworkPair)
    levels = torch.tensor([.95, .4, .4, .95])
    x, _, cond = inputs(policy)
    before = velocity(policy, x, levels, cond)
    moved(policy)
    after = velocity(policy, x, levels, cond)
    assert ((after - before).flatten(1).abs().amax(1) > 1e-3).all()
    with policy.reference(): assert torch.equal(velocity(policy, x, levels, cond), before)
    policy.save(tmp_path)
    plain = general_policy('wan2.2')
    load_loras(plain.pipeline, tmp_path)
    assert torch.equal(velocity(plain, x, levels, cond), after)
    assert differences(policy, plain.pipeline)[0] == 0


def test_videos_are_scored_by_their_frames():
    videos = torch.rand(2, 5, 3, 8, 8)
    assert torch.equal(score(brightness, videos, PROMPTS), score(brightness, videos[:, 0], PROMPTS))


def test_a_shift_is_an_override():
    policy = general_policy('cogview4')
    assert policy.sigmas(4, 3.)[1] == pytest.approx(.9)
    assert policy.sigmas(4)[1] < .8


def test_pipelines_that_cannot_be_entered(monkeypatch):
    pipeline = small_pipeline('z-image')
    def refused(match):
        with pytest.raises(ValueError, match=f'is a ZImagePipeline, which {match}'): GeneralPolicy(pipeline, device='cpu')
    euler = pipeline.scheduler
    pipeline.scheduler = small_pipeline('sd1.5').scheduler
    refused('is not a flow: its scheduler is a DDIMScheduler')
    pipeline.scheduler = None
    refused('has no scheduler with a step')
    pipeline.scheduler = euler
    parts = pipeline.components
    monkeypatch.setattr(type(pipeline), 'components', parts | dict(audio_vae=pipeline.vae))
    refused('makes sound together with pictures')
    monkeypatch.setattr(type(pipeline), 'components', parts)
    monkeypatch.delattr(type(pipeline), 'encode_prompt')
    refused('has no encode_prompt: name a text-to-image flow pipeline')


def test_modular_pipelines_are_refused(tmp_path):
    (tmp_path/'modular_model_index.json').write_text(json.dumps({'_class_name': 'Flux3ModularPipeline'}))
    with pytest.raises(ValueError, match='is a modular pipeline, which has no call of its own'): load_policy(str(tmp_path), 'cpu')


def test_a_side_that_would_be_changed_is_refused():
    with pytest.raises(ValueError, match='resolution must be a multiple of 4, got 30'): general_policy('flux2-dev', resolution=30)
    with pytest.raises(ValueError, match='frames is no argument of a Flux2Pipeline'): general_policy('flux2-dev', call=dict(frames=3))
