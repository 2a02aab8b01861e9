"Attention entropy against the matrix, for any shape and dtype, on every path there is; recording that leaves no trace."
import contextlib
import math
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from diffusers import FluxTransformer2DModel, SD3Transformer2DModel, UNet2DConditionModel
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from egrpo.core.attention import (
    ATTENTION_PATHS,
    _chunked,
    _cpu,
    _from_fused,
    _refusal,
    attention_entropy,
    attention_path,
    mean_entropy,
    query_subset,
)
from egrpo.models.recorder import record_attention_entropy
from egrpo.paper.records import load_record

DTYPES = {torch.float64: 2e-6, torch.float32: 2e-5, torch.bfloat16: 2e-5, torch.float16: 2e-5} # CPU: half is widened
CUDA = ['flash', 'cudnn', 'efficient', 'chunked']


def matrix(q, k, scale=None):
    "The oracle: all weights, in float64."
    logp = ((q.shape[-1]**-.5 if scale is None else scale) * q.double() @ k.double().mT).log_softmax(-1)
    return -(logp.exp() * logp).sum(-1)


def tensors(B, H, N, M, D, seed=0, size=1., dtype=torch.float32):
    g = torch.Generator().manual_seed(seed)
    return (size * torch.randn(B, H, N, D, generator=g)).to(dtype), torch.randn(B, H, M, D, generator=g).to(dtype)


@settings(max_examples=60)
@given(st.integers(1, 3), st.integers(1, 4), st.integers(1, 70), st.integers(1, 70), st.integers(1, 48), st.floats(.01, 4),
       st.integers(0, 99), st.sampled_from(list(DTYPES)), st.sampled_from(['cpu', 'chunked']))
def test_is_the_matrix(B, H, N, M, D, size, seed, dtype, path):
    q, k = tensors(B, H, N, M, D, seed, size, dtype)
    ours = attention_entropy(q, k, path=path)
    assert ours.dtype == torch.float32 and ours.shape == (B, H, N) and not ours.requires_grad
    assert_close(ours.double(), matrix(q, k), rtol=0, atol=DTYPES[dtype])
    assert (ours > -1e-4).all() and (ours < math.log(M) + 1e-4).all()


@pytest.mark.parametrize('bug', ['sign', 'scale', 'bits', 'values'])
def test_oracle_notices(bug):
    q, k = tensors(1, 2, 20, 30, 16)
    wrong = dict(sign=lambda q, k, s: (_cpu(q, k, s)[0], -_cpu(q, k, s)[1]), scale=lambda q, k, s: _cpu(q, k, 1.01 * s),
                 bits=lambda q, k, s: (_cpu(q, k, s)[0], _cpu(q, k, s)[1] / math.log(2)), values=lambda q, k, s: (q, _cpu(q, k, s)[1]))[bug]
    error = (_from_fused(wrong, q, k, 16**-.5) - matrix(q, k)).abs().max()
    assert error > 100 * DTYPES[torch.float32]


@settings(max_examples=20)
@given(st.integers(2, 40), st.integers(0, 99))
def test_order_of_keys_and_a_constant_do_not_matter(M, seed):
    q, k = tensors(1, 2, 8, M, 16, seed)
    g = torch.Generator().manual_seed(seed)
    H = attention_entropy(q, k)
    assert_close(attention_entropy(q, k[:, :, torch.randperm(M, generator=g)]), H, rtol=0, atol=1e-5)
    assert_close(attention_entropy(q, k + 3 * torch.randn(1, 2, 1, 16, generator=g)), H, rtol=0, atol=2e-5)


def test_ends():
    q, k = tensors(2, 3, 10, 50, 16)
    for path in ('cpu', 'chunked'):
        assert_close(attention_entropy(q, k, scale=0, path=path), torch.full((2, 3, 10), math.log(50)))
        eye = torch.eye(16).expand(1, 1, 16, 16)
        assert_close(attention_entropy(eye, eye, scale=100, path=path), torch.zeros(1, 1, 16), rtol=0, atol=5e-5)
        assert_close(attention_entropy(q, k[:, :, :1], path=path), torch.zeros(2, 3, 10), rtol=0, atol=5e-6)


def test_strided_input_and_several_chunks(monkeypatch):
    monkeypatch.setattr('egrpo.core.attention.CHUNK_ELEMENTS', 500)
    x = torch.randn(2, 40, 3, 16).transpose(1, 2) # as diffusers hands it over: heads are a view
    for path in ('cpu', 'chunked'): assert_close(attention_entropy(x, x, path=path).double(), matrix(x, x), rtol=0, atol=2e-5)


def test_autocast_does_not_narrow():
    q, k = tensors(1, 2, 20, 30, 16)
    with torch.autocast('cpu', torch.bfloat16):
        for path in ('cpu', 'chunked'): assert_close(attention_entropy(q, k, path=path).double(), matrix(q, k), rtol=0, atol=2e-5)


@pytest.mark.parametrize('N, every', [(64, 4), (4096, 16), (60, 7), (5, 5), (9, 2)])
def test_subsets_partition(N, every):
    parts = [query_subset(N, every, start) for start in range(every)]
    assert torch.cat(parts).sort().values.tolist() == list(range(N))
    assert all(p.diff().gt(0).all() and abs(len(p) - N / every) < 1 for p in parts)
    assert torch.equal(query_subset(N, every, 1), query_subset(N, every, 1 + every))


def test_mean_over_starts_is_exact():
    q, k = tensors(2, 3, 64, 30, 16)
    exact, none = mean_entropy(attention_entropy(q, k), 64)
    some = torch.stack([mean_entropy(attention_entropy(q, k, queries=query_subset(64, 8, s)), 64)[0] for s in range(8)])
    assert_close(some.mean(0), exact)
    assert not none.any() and (some - exact).abs().max() > 1e-4


@pytest.mark.parametrize('name', ['flash', 'cudnn', 'efficient'])
def test_cuda_operators_have_the_shapes_we_expect(name):
    "What can be held without a GPU: the calls, and the padding of their log-sum-exp."
    for D in (16, 20, 128):
        q, k = torch.empty(2, 3, 33, D, dtype=torch.bfloat16, device='meta'), torch.empty(2, 3, 70, D, dtype=torch.bfloat16, device='meta')
        assert ATTENTION_PATHS[name].entropy(q, k, .1).shape == (2, 3, 33)


@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a GPU')
def test_cuda_paths():
    "Every path that serves is run, and one always does."
    for dtype, D in ((d, D) for d in (torch.float32, torch.bfloat16, torch.float16) for D in (20, 64, 128)):
        q, k = (x.cuda() for x in tensors(2, 3, 300, 333, D, dtype=dtype))
        serving = [n for n in CUDA if not _refusal(ATTENTION_PATHS[n], q, k)]
        assert serving[0] == attention_path(q, k)[0] and serving[-1] == 'chunked'
        for name in serving:
            exact = dtype == torch.float32 or name == 'chunked'
            error = attention_entropy(q, k, path=name).cpu().double() - matrix(q.cpu(), k.cpu())
            assert error.abs().max() < (1e-3 if exact else .05) and error.mean().abs() < (1e-4 if exact else 2e-3), (name, dtype, D)


def test_path_is_said():
    q, k = tensors(1, 1, 4, 4, 8)
    assert attention_path(q, k) == ('cpu', 'the first choice on cpu') and attention_path(q, k, 'chunked') == ('chunked', 'as asked')
    name, why = attention_path(q.to('meta'), k.to('meta'))
    assert name == 'chunked' and 'cpu needs cpu, not meta' in why


def test_attention_needs_torch_only():
    heavy = {'diffusers', 'transformers', 'peft', 'pandas'}
    code = f"import sys, egrpo.core.attention; print({{m.split('.')[0] for m in sys.modules}} & {heavy})"
    assert subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True).stdout.strip() == 'set()'


def flux():
    return FluxTransformer2DModel(in_channels=4, num_layers=1, num_single_layers=1, num_attention_heads=2, attention_head_dim=16,
                                  joint_attention_dim=8, pooled_projection_dim=8, axes_dims_rope=(4, 6, 6))


def sd3():
    return SD3Transformer2DModel(sample_size=8, patch_size=2, in_channels=4, out_channels=4, num_layers=2, dual_attention_layers=(0,),
                                 attention_head_dim=8, num_attention_heads=2, joint_attention_dim=8, caption_projection_dim=16,
                                 pooled_projection_dim=8, pos_embed_max_size=8, qk_norm='rms_norm')


def unet():
    return UNet2DConditionModel(sample_size=8, block_out_channels=(16, 32), layers_per_block=1, norm_num_groups=8, cross_attention_dim=8,
                                attention_head_dim=8, down_block_types=('CrossAttnDownBlock2D', 'DownBlock2D'),
                                up_block_types=('UpBlock2D', 'CrossAttnUpBlock2D'))


def inputs(model, B=3):
    "Arguments of a forward pass; text has 5 tokens, the image 16 (UNet: 64 and 16)."
    g = torch.Generator().manual_seed(B)
    def r(*shape): return torch.randn(*shape, generator=g)
    level, text = torch.rand(B, generator=g), r(B, 5, 8)
    if isinstance(model, UNet2DConditionModel): return dict(sample=r(B, 4, 8, 8), timestep=1000 * level, encoder_hidden_states=text)
    common = dict(encoder_hidden_states=text, pooled_projections=r(B, 8), timestep=level)
    if isinstance(model, SD3Transformer2DModel): return dict(hidden_states=r(B, 4, 8, 8), **common)
    ids = torch.stack(torch.meshgrid(torch.zeros(1), torch.arange(4.), torch.arange(4.), indexing='ij'), -1).view(-1, 3)
    return dict(hidden_states=r(B, 16, 4), txt_ids=torch.zeros(5, 3), img_ids=ids, **common)


MODELS = dict(flux=flux, sd3=sd3, unet=unet)
every_model = pytest.mark.parametrize('name', MODELS)


def build(name):
    torch.manual_seed(0)
    model = MODELS[name]().eval()
    with torch.no_grad():
        for n, p in model.named_parameters():
            if '.to_q' in n or '.to_k' in n or 'add_q' in n or 'add_k' in n: p.mul_(6) # so that attention is not uniform
    return model


def state(model):
    "What a recording could leave behind: hooks, processors, attributes."
    hooks = ['_forward_' + h for h in ('hooks', 'pre_hooks', 'hooks_always_called', 'hooks_with_kwargs', 'pre_hooks_with_kwargs')]
    return [(n, id(getattr(m, 'processor', None)), id(m.forward.__func__), sorted(m.__dict__), [len(getattr(m, h)) for h in hooks])
            for n, m in model.named_modules()]


@contextlib.contextmanager
def calls(kept):
    "Keep queries and keys of every attention call."
    true = F.scaled_dot_product_attention
    def keep(query, key, *args, **kwargs): return kept.append((query, key)) or true(query, key, *args, **kwargs)
    F.scaled_dot_product_attention = keep
    try: yield
    finally: F.scaled_dot_product_attention = true


@torch.no_grad()
def text_rows(model):
    "Which queries of each call move in the first layer that sees text when the text changes, with everything else the same."
    one, other, given = [], [], inputs(model)
    with calls(one): model(**given)
    with calls(other): model(**{**given, 'encoder_hidden_states': -given['encoder_hidden_states']})
    return [(a[0] != b[0]).any(dim=3).any(dim=1).any(dim=0) for a, b in zip(one, other)]


@every_model
@pytest.mark.parametrize('every', [1, 3])
def test_outputs_are_equal_to_the_last_bit(name, every):
    model, before = build(name), None
    given, before = inputs(model), state(model)
    plain = model(**given).sample
    with record_attention_entropy(model, every=every): recorded = model(**given).sample
    assert torch.equal(plain, recorded) and recorded.requires_grad
    assert state(model) == before
    gradients = [torch.autograd.grad(x.sum(), model.parameters(), allow_unused=True) for x in (plain, recorded)]
    assert all((a is None and b is None) or torch.equal(a, b) for a, b in zip(*gradients))


@every_model
@torch.no_grad()
def test_values_are_those_of_the_matrix(name):
    model, kept = build(name), []
    with calls(kept): model(**inputs(model))
    with record_attention_entropy(model) as H: model(**inputs(model))
    image = dict(flux=slice(5, None), sd3=slice(0, 16), unet=slice(None))[name]
    truth = torch.stack([matrix(q, k)[:, :, image].mean((1, 2)) for q, k in kept])
    assert len(H.blocks) == len(kept) and len(set(H.blocks)) == len(kept)
    assert_close(H.entropy()[0].double(), truth, rtol=0, atol=2e-5)
    whole = torch.stack([matrix(q, k).mean((1, 2)) for q, k in kept])
    assert name == 'unet' or (whole - truth).abs().max() > 1e-2 # text rows counted in would be seen
    frame = H.frame()
    assert len(frame) == truth.numel() and frame.entropy.tolist() == H.entropy().flatten().tolist() and H.seconds > 0


@pytest.mark.parametrize('name, text', [('flux', slice(0, 5)), ('sd3', slice(16, 21))])
def test_layout_is_the_models_own(name, text):
    "The rows that follow the text in the first block are those the recorder takes for text."
    rows = text_rows(build(name))[0]
    expected = torch.zeros(21, dtype=torch.bool)
    expected[text] = True
    assert torch.equal(rows, expected)


@every_model
@torch.no_grad()
def test_keys(name):
    model, kept = build(name), []
    given, blocks = inputs(model), dict(flux='', sd3='.attn', unet='attn2')[name]
    with calls(kept): model(**given)
    if name == 'sd3': blocks = '1.attn' # the layer without a second attention
    with record_attention_entropy(model, blocks=blocks, keys='text', normalize=True) as H: model(**given)
    text, image = dict(flux=(slice(0, 5), slice(5, None)), sd3=(slice(16, None), slice(0, 16)), unet=(slice(None), slice(None)))[name]
    with record_attention_entropy(model) as every: model(**given)
    chosen = [kept[i] for i, n in enumerate(every.blocks) if blocks in n]
    truth = torch.stack([matrix(q, k[:, :, text])[:, :, image].mean((1, 2)) / math.log(5) for q, k in chosen])
    assert_close(H.entropy()[0].double(), truth, rtol=0, atol=2e-5)


@every_model
@torch.no_grad()
def test_rows_come_back_in_order(name):
    model = build(name)
    given = inputs(model, 5)
    def rows(i): return {k: v[i] if v.shape[0] == 5 and k not in ('txt_ids', 'img_ids') else v for k, v in given.items()}
    with record_attention_entropy(model, every=2) as whole: model(**given)
    with record_attention_entropy(model, every=2) as parts:
        for i in (slice(0, 2), slice(2, 4), slice(4, 5)): model(**rows(i))
    assert_close(parts.entropy(samples=5), whole.entropy(), rtol=0, atol=2e-5)
    assert_close(parts.error(samples=5), whole.error(), rtol=0, atol=2e-5)
    assert (whole.entropy()[0].mean(0).diff().abs() > 1e-4).all() # samples differ, so order matters


@every_model
def test_exception_restores(name):
    model = build(name)
    given, before = inputs(model), state(model)
    broken = {**given, 'encoder_hidden_states': given['encoder_hidden_states'][..., :3]}
    with pytest.raises(RuntimeError), record_attention_entropy(model): model(**broken)
    assert state(model) == before
    with pytest.raises(KeyError), record_attention_entropy(model): raise KeyError
    assert state(model) == before
    with record_attention_entropy(model) as H: # it can be recorded again; a pass that failed in between leaves no row
        model(**given)
        with pytest.raises(RuntimeError): model(**broken)
        model(**given)
    assert len(H) == 2 and torch.equal(H.entropy()[0], H.entropy()[1])


def test_nested_is_refused_and_two_models_are_not():
    a, b = build('flux'), build('unet')
    with torch.no_grad(), record_attention_entropy(a) as outer:
        with pytest.raises(ValueError, match='being recorded already'), record_attention_entropy(a): pass
        with record_attention_entropy(b) as inner: a(**inputs(a)), b(**inputs(b))
    assert len(outer) == len(inner) == 1 and outer.blocks != inner.blocks


def test_a_checkpointed_pass_is_counted_once():
    model = build('flux').train()
    model.enable_gradient_checkpointing()
    with record_attention_entropy(model) as H: model(**inputs(model)).sample.sum().backward()
    assert len(H) == 1


@pytest.mark.filterwarnings('ignore:Mismatch dtype')
def test_under_autocast_it_sees_what_the_kernel_sees():
    model, kept = build('flux'), []
    with torch.no_grad(), torch.autocast('cpu', torch.bfloat16):
        with calls(kept): plain = model(**inputs(model)).sample
        with record_attention_entropy(model) as H: assert torch.equal(model(**inputs(model)).sample, plain)
    truth = torch.stack([matrix(q.bfloat16(), k.bfloat16())[:, :, 5:].mean((1, 2)) for q, k in kept])
    assert_close(H.entropy()[0].double(), truth, rtol=0, atol=2e-5)


@torch.no_grad()
def test_with_peft():
    from peft import LoraConfig, get_peft_model
    model = build('flux')
    base = model(**inputs(model)).sample
    wrapped = get_peft_model(model, LoraConfig(r=2, target_modules=['to_q', 'to_k'], init_lora_weights=False))
    adapted = wrapped(**inputs(model)).sample
    with record_attention_entropy(wrapped) as H:
        assert torch.equal(wrapped(**inputs(model)).sample, adapted)
        with wrapped.disable_adapter(): assert torch.equal(wrapped(**inputs(model)).sample, base)
    assert not torch.equal(adapted, base) and (H.entropy()[0] - H.entropy()[1]).abs().max() > 1e-3


def test_what_is_not_seen_is_said():
    from diffusers.models.attention_processor import AttnProcessor
    model = build('unet')
    model.set_attn_processor(AttnProcessor()) # materialises its weights, no fused call
    with torch.no_grad(), pytest.raises(ValueError, match='made no call of F.scaled_dot'), record_attention_entropy(model):
        model(**inputs(model))


def test_a_mask_is_refused():
    model = build('unet')
    mask = torch.ones(3, 5)
    mask[:, 3:] = 0
    with torch.no_grad(), pytest.raises(ValueError, match='attends with a mask'), record_attention_entropy(model):
        model(**inputs(model), encoder_attention_mask=mask)


def test_the_record_counts_what_a_hand_counts():
    "FLUX.1-dev at 1024 px: 19 + 38 blocks, 24 heads of 128, two products of 4608 x 4608; recorded, of the image's 4096 x 4608."
    data = load_record('attention_benchmark')['data']
    assert data['flops']['attention'] == 57 * 24 * 2 * 2 * 4608**2 * 128
    assert data['flops']['added'] == {str(n): 57 * 24 * 2 * 2 * (4096 // n) * 4608 * 128 for n in (1, 4, 16, 32)}
    assert data['attention']['error'] < 1e-5 and len({len(t) for t in data['attention']['seconds'].values()}) == 1


def test_chunked_is_bounded(monkeypatch):
    monkeypatch.setattr('egrpo.core.attention.CHUNK_ELEMENTS', 300)
    sizes, true = [], torch.special.entr
    monkeypatch.setattr(torch.special, 'entr', lambda x: sizes.append(x.numel()) or true(x))
    q, k = tensors(1, 2, 20, 30, 8)
    _chunked(q, k, .3)
    assert len(sizes) == 4 and max(sizes) <= 300
