"Attention entropy of newer families: masked, of other layouts, and in training."
from contextlib import contextmanager

import pytest
import torch
import torch.nn.functional as F
from parity import GUIDANCE, PROMPTS, general_policy, train
from torch.testing import assert_close

from egrpo.methods.aegpo import entropy_profiles
from egrpo.models.policy import load_policy
from egrpo.models.recorder import record_attention_entropy
from egrpo.testing.pipelines import small_pipeline

pytestmark = pytest.mark.filterwarnings('ignore')
OWN = {'flux2-dev': 32, 'qwen-image': 32, 'z-image': 24} # 36 tokens of Z-Image are padded to 64
GENERAL = 'wan2.1', 'lumina2', 'cogview4'
TOKENS = {'qwen-image': 16, 'z-image': 36, 'lumina2': 16} # of an image; the others have 64
FIRST = {'flux2-dev': 'transformer_blocks.0.', 'qwen-image': 'transformer_blocks.0.', 'z-image': 'layers.0.',
         'lumina2': 'layers.0.', 'cogview4': 'transformer_blocks.0.'} # layers that first see text and image


def policy_of(name):
    if name in GENERAL: policy = general_policy(name)
    else: policy = load_policy(small_pipeline(name), 'cpu', lora_rank=None, resolution=OWN[name], guidance=GUIDANCE)
    with torch.no_grad():
        for n, p in policy.transformer.named_parameters():
            if '.to_q' in n or '.to_k' in n: p.mul_(6) # so that attention is not uniform
    return policy


def image_tokens(name, num_queries, visible, n):
    "Where the image's queries are in a row, by hand."
    if name == 'wan2.1': return slice(None)
    if name == 'z-image': return slice(0, n)
    return slice(visible - n, visible) if name == 'lumina2' else slice(num_queries - n, None)


@contextmanager
def calls(model, kept):
    "Keep each call of attention with the name of its layer."
    true, layer, hooks = F.scaled_dot_product_attention, [None], []
    for name, m in model.named_modules():
        if hasattr(m, 'processor'): hooks.append(m.register_forward_pre_hook(lambda *_, name=name: layer.__setitem__(0, name)))
    def keep(query, key, value, attn_mask=None, scale=None, **kwargs):
        kept.append((layer[0], query, key, attn_mask, scale))
        return true(query, key, value, attn_mask=attn_mask, scale=scale, **kwargs)
    F.scaled_dot_product_attention = keep
    try: yield
    finally:
        F.scaled_dot_product_attention = true
        for hook in hooks: hook.remove()


def truth(name, call, n, keys=None):
    "Mean entropy (B,) from the whole matrix in float64, its padding at minus infinity; and of how many keys."
    _, q, k, mask, scale = call
    scores = q.double() @ k.double().mT * (scale or q.shape[-1]**-.5)
    if mask is not None: scores = scores.masked_fill(~mask, -torch.inf)
    entropy = torch.special.entr(scores.softmax(-1)).sum(-1).mean(1)
    visible = [k.shape[2]] * len(q) if mask is None else mask[:, 0, 0].sum(-1).tolist()
    rows = [entropy[i, image_tokens(name, q.shape[2], visible[i], n)].mean() for i in range(len(q))]
    return torch.stack(rows), torch.tensor(visible)


def run(policy, cond):
    x = torch.randn(3, *policy.latent_shape, generator=torch.Generator().manual_seed(0))
    with torch.no_grad(), policy.unguided(): return policy.velocity(x, torch.tensor([.7, .7, .7]), cond)


@pytest.mark.parametrize('name', [*OWN, *GENERAL])
def test_values_are_those_of_the_masked_matrix(name):
    policy = policy_of(name)
    cond = policy.encode([*PROMPTS, 'a cat'])
    n = TOKENS.get(name, 64)
    run(policy, cond)
    kept, changed = [], []
    with calls(policy.transformer, kept): plain = run(policy, cond)
    with record_attention_entropy(policy.transformer) as H: recorded = run(policy, cond)
    with record_attention_entropy(policy.transformer, normalize=True) as shares: run(policy, cond)
    assert torch.equal(plain, recorded) and H.blocks == list(dict.fromkeys(c[0] for c in kept if 'context_refiner' not in c[0]))
    for b, block in enumerate(H.blocks):
        found = [truth(name, c, n) for c in kept if c[0] == block]
        mean, visible = torch.cat([m for m, _ in found]), torch.cat([v for _, v in found])
        assert_close(H.entropy(samples=3)[0, b].double(), mean, rtol=0, atol=2e-5)
        assert_close(shares.entropy(samples=3)[0, b].double(), mean / visible.log(), rtol=0, atol=2e-5)
    if name in ('qwen-image', 'z-image'): assert sum(c[3] is not None for c in kept) > 1 # masks were seen
    if name not in FIRST: return
    negated = policy.encode([*PROMPTS, 'a cat']) # other texts as long: the image's queries stay as they are where both first meet
    if name in GENERAL: negated.rows = [negate(row) for row in negated.rows]
    else: negated._whole = (-negated._whole[0], None)
    with calls(policy.transformer, changed): run(policy, negated)
    (_, q, _, mask, _), other = (next(c for c in k if c[0].startswith(FIRST[name])) for k in (kept, changed))
    for i in range(len(q)):
        visible = q.shape[2] if mask is None else int(mask[i].sum())
        moves = (q[i] != other[1][i]).any(0).any(-1)
        assert not moves[image_tokens(name, q.shape[2], visible, n)].any() and moves.sum() > 5


def negate(tree):
    "Embeddings with another sign; masks and positions stay."
    if torch.is_tensor(tree): return -tree if tree.is_floating_point() else tree
    return type(tree)(negate(o) for o in tree) if isinstance(tree, (list, tuple)) else tree


def test_keys_of_a_masked_row():
    "Text keys are the row's own, without padding."
    policy, kept = policy_of('qwen-image'), []
    cond = policy.encode([*PROMPTS, 'a cat'])
    with calls(policy.transformer, kept): run(policy, cond)
    with record_attention_entropy(policy.transformer, keys='text', normalize=True, every=2) as H: run(policy, cond)
    _, q, k, mask, _ = kept[0]
    for i, length in enumerate(cond.lengths.tolist()):
        scores = q[i].double() @ k[i, :, :length].double().mT * q.shape[-1]**-.5
        mean = torch.special.entr(scores.softmax(-1)).sum(-1)[:, -16:].mean() / torch.tensor(float(length)).log()
        assert abs(H.entropy()[0, 0, i] - mean) < 4 * H.error()[0, 0, i] and H.error()[0, 0, i] > 0


def test_two_networks_are_refused():
    with pytest.raises(ValueError, match='transformer has two networks'):
        record_attention_entropy(general_policy('wan2.2').transformer).__enter__()


@pytest.mark.parametrize('name', GENERAL)
def test_profiles_of_the_general_policy(name):
    policy = general_policy(name)
    both = entropy_profiles(policy, PROMPTS, 3)
    assert both.shape == (2, 3) and (both > 0).all()
    assert torch.equal(entropy_profiles(policy, PROMPTS[::-1], 3), both.flip(0))


@pytest.mark.parametrize('name', ['flux2-dev', 'qwen-image'])
def test_aegpo_trains(name, tmp_path):
    policy = load_policy(small_pipeline(name), 'cpu', lora_rank=2, resolution=32, guidance=GUIDANCE)
    trainer = train(policy, tmp_path, 3, method='aegpo', base='egrpo', num_generations=4, num_steps=6)
    assert trainer.iteration == 3
    with record_attention_entropy(policy.transformer) as trained, torch.no_grad(): run(policy, policy.encode([*PROMPTS, 'a cat']))
    with policy.reference(), record_attention_entropy(policy.transformer) as before: run(policy, policy.encode([*PROMPTS, 'a cat']))
    assert (trained.entropy() - before.entropy()).abs().max() > 1e-5
