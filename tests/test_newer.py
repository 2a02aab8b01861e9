"FLUX.2, Qwen-Image and Z-Image by classes of their own: as the general policy, with every setting of a run."

import pytest
import torch
import torch.nn.functional as F
from diffusers.models.attention_dispatch import _AttentionBackendRegistry
from parity import FAST, GUIDANCE, PROMPTS, fast_path, general_policy, inputs, load_loras, moved, packed, ratio_error, train, velocity
from torch.distributed.device_mesh import init_device_mesh
from torch.testing import assert_close

from egrpo.models.general import GeneralPolicy
from egrpo.models.lora import lora_layers
from egrpo.models.newer_families import Flux2Policy
from egrpo.models.policy import load_policy
from egrpo.testing.pipelines import small_pipeline

pytestmark = pytest.mark.filterwarnings('ignore')
NEW = 'flux2-dev', 'flux2-klein', 'qwen-image', 'z-image'


def own_policy(name, dtype=None, lora_rank=None, **how):
    return load_policy(small_pipeline(name), 'cpu', dtype, lora_rank, resolution=32, guidance=GUIDANCE, **how)


def gradient(policy):
    "Of a LoRA, all in one."
    policy.velocity(*inputs(policy)).square().mean().backward()
    return torch.cat([p.grad.flatten() for p in policy.parameters().values() if p.grad is not None])


@pytest.mark.parametrize('name', FAST)
def test_equal_to_the_general_policy(name): assert fast_path(name, 1)[0] < 5e-6


def test_the_distilled_klein_is_not_guided():
    pipeline = small_pipeline('flux2-klein')
    pipeline.register_to_config(is_distilled=True)
    own = load_policy(pipeline, 'cpu', lora_rank=None, resolution=32, guidance=GUIDANCE)
    general = GeneralPolicy(pipeline, None, 32, guidance=GUIDANCE, device='cpu')
    assert own.nfe_per_velocity == general.nfe_per_velocity == 1
    noise, levels, _ = inputs(own)
    with torch.no_grad(): theirs = general.velocity(packed(own, noise), levels, inputs(general)[2])
    assert_close(packed(own, velocity(own)), theirs, atol=5e-6, rtol=0)


@pytest.mark.parametrize('guidance, evaluations', [(0., 1), (1., 2)])
def test_z_image_is_guided_above_0(guidance, evaluations):
    "Its pipeline extrapolates beyond the prompted velocity: a scale of 1 is a second evaluation."
    own = load_policy(small_pipeline('z-image'), 'cpu', lora_rank=None, resolution=32, guidance=guidance)
    general = general_policy('z-image', guidance=guidance)
    assert own.nfe_per_velocity == general.nfe_per_velocity == evaluations
    assert_close(velocity(own), velocity(general), atol=5e-6, rtol=0)
    with own.unguided(): assert own.nfe_per_velocity == 1
    assert own.guidance == guidance


def test_a_long_prompt_is_cut_where_the_pipeline_cuts_it():
    policies = own_policy('qwen-image'), general_policy('qwen-image') # this one by the call's own length
    own, general = (p.encode(['a red cube ' * 300]) for p in policies)
    assert own.embeds.shape[1] == 512
    noise, level = torch.randn(1, *policies[0].latent_shape, generator=torch.Generator().manual_seed(0)), torch.tensor([.9])
    with torch.no_grad(): ours = policies[0].velocity(noise, level, own)
    with torch.no_grad(): theirs = policies[1].velocity(packed(policies[0], noise), level, general)
    assert_close(packed(policies[0], ours), theirs, atol=5e-6, rtol=0)


@pytest.mark.parametrize('name', NEW)
def test_gradients_of_a_lora(name):
    "As the general policy's, with every layer of the blocks; activations may be computed again."
    own, general = (moved(f(name, lora_rank=2)) for f in (own_policy, general_policy))
    assert len(own.parameters()) == 2 * len(lora_layers(small_pipeline(name).transformer))
    x, levels, cond = inputs(own)
    own.velocity(x, levels, cond).square().mean().backward()
    general.velocity(packed(own, x), levels, inputs(general)[2]).square().mean().backward()
    grads = {n: p.grad for n, p in own.parameters().items() if p.grad is not None}
    for n, p in general.parameters().items():
        if p.grad is not None: assert_close(grads[n], p.grad, atol=1e-6, rtol=1e-4)
    again = moved(own_policy(name, lora_rank=2, gradient_checkpointing=True, micro_batch=3))
    assert_close(gradient(again), torch.cat([g.flatten() for g in grads.values()]), atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize('name', ['flux2-dev', 'qwen-image', 'z-image'])
def test_training(name, tmp_path):
    "Ratio 1 at the first update, evaluations as planned (the trainer compares), the LoRA in a plain pipeline."
    policy = own_policy(name, lora_rank=2)
    assert ratio_error(policy) < 1e-6
    before = velocity(policy)
    train(policy, tmp_path, 2)
    after = velocity(policy)
    assert (after - before).abs().max() > 1e-3
    with policy.reference(): assert torch.equal(velocity(policy), before)
    plain = own_policy(name)
    load_loras(plain.pipeline, tmp_path/'run'/'model')
    assert_close(velocity(plain), after, atol=1e-5, rtol=0)


@pytest.mark.parametrize('name', ['qwen-image', 'z-image'])
def test_rows_do_not_depend_on_their_neighbours(name):
    policy = own_policy(name)
    x, levels, cond = inputs(policy)
    with torch.no_grad(): alone = [policy.velocity(x[i:i+1], levels[i:i+1], cond[[i]]) for i in range(4)]
    short = policy.encode(PROMPTS[:1]) # without padding
    with torch.no_grad(): first = policy.velocity(x[:1], levels[:1], short)
    assert_close(velocity(policy), torch.cat(alone), atol=5e-6, rtol=0)
    assert_close(first, alone[0], atol=5e-6, rtol=0)


@pytest.mark.parametrize('name', ['flux2-klein', 'qwen-image', 'z-image'])
def test_embeddings_are_kept_and_encoders_dropped(name, tmp_path):
    policy = own_policy(name, text_encoders='drop', embeddings=tmp_path)
    expected = velocity(policy)
    policy.drop_text_encoders([*PROMPTS, 'a cat'])
    assert policy.pipeline.text_encoder is None and len([*tmp_path.iterdir()]) == 4 # the empty prompt, too
    assert torch.equal(velocity(policy), expected)
    with pytest.raises(ValueError, match="'a dog' was not embedded"): policy.encode(['a dog'])


def test_a_whole_network_and_its_reference():
    policy = own_policy('z-image', lora_rank=0)
    policy.freeze_reference()
    before = velocity(policy)
    moved(policy)
    assert (velocity(policy) - before).abs().max() > 1e-2
    with policy.reference(): assert torch.equal(velocity(policy), before)


@pytest.mark.parametrize('name,dtype', [('flux2-dev', 'bf16'), ('qwen-image', 'bf16'), ('z-image', 'bf16'), ('z-image', 'fp16')])
def test_low_precision(name, dtype):
    expected = velocity(own_policy(name))
    policy = own_policy(name, dtype, 2)
    assert_close(velocity(policy), expected, atol=.05 * expected.abs().max().item(), rtol=0)
    assert gradient(policy).isfinite().all()
    assert policy.decode(inputs(policy)[0]).isfinite().all()


@pytest.mark.parametrize('name', ['flux2-dev', 'qwen-image', 'z-image'])
def test_shared(name):
    "One process alone: parts of a network are the whole."
    torch.distributed.init_process_group('gloo', store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        shared = own_policy(name, lora_rank=2, mesh=init_device_mesh('cpu', (1,)))
        with shared.together(): assert_close(velocity(shared), velocity(own_policy(name)), atol=1e-5, rtol=0)
    finally: torch.distributed.destroy_process_group()


@pytest.mark.parametrize('name', ['flux-dev', 'flux2-klein', 'qwen-image'])
def test_a_backend_of_attention(name):
    "The same in rollout and update; no other model of the process has it."
    plain, math = (load_policy(small_pipeline(name), 'cpu', lora_rank=2, resolution=32, attention=o) for o in (None, '_native_math'))
    processors = [m.processor for m in math.transformer.modules() if hasattr(m, 'processor')]
    assert {o._attention_backend for o in processors} == {'_native_math'}
    assert _AttentionBackendRegistry.get_active_backend()[0] == 'native'
    assert_close(velocity(math), velocity(plain), atol=1e-5, rtol=0)
    assert ratio_error(math) < 1e-6


@pytest.mark.parametrize('name, attend, says', [
    ('qwen-image', lambda query, key, value: own_attention(query, key, value), 'it gives other values'), # drops the mask
    ('flux2-dev', lambda query, key, value: own_attention(query, key, value).detach(), 'no gradient flows')])
def test_a_backend_that_would_not_train(name, attend, says, monkeypatch):
    monkeypatch.setitem(_AttentionBackendRegistry._backends, 'native', attend)
    monkeypatch.setitem(_AttentionBackendRegistry._supported_arg_names, 'native', ('query', 'key', 'value'))
    def load(rank): return own_policy(name, None, rank, attention='native')
    with pytest.raises(ValueError, match=f"attention 'native' cannot be used here .{says}"): load(2)
    if name == 'flux2-dev': load(None) # to sample


def own_attention(*heads):
    "Attention in diffusers' order of axes, without a mask."
    return F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in heads)).transpose(1, 2)


def test_a_side_that_has_no_whole_tokens():
    with pytest.raises(ValueError, match='resolution must be a multiple of 4, got 30'):
        Flux2Policy(small_pipeline('flux2-dev'), resolution=30, device='cpu')
