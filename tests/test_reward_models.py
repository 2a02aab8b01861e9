"""Published rewards on small random weights, against computations that share nothing with them: torch's own layers, by the published names.
What the package hpsv2 itself says is in test_hpsv2.py."""
import json
import math
import shutil
import threading
from contextlib import contextmanager
from functools import cache, partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.util import find_spec

import huggingface_hub
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.testing import assert_close

from egrpo.rewards.published import (
    IMAGE_REWARD_MEAN,
    IMAGE_REWARD_STD,
    REWARD_MODELS,
    ClipReward,
    ImageReward,
    OcrReward,
    RewardModel,
    cut_out,
    fit_in,
    load_clip,
    load_reward,
    load_tokenizer,
    read_weights,
    squash,
    to_safetensors,
)
from egrpo.rewards.reward import RewardError, get_reward
from egrpo.rewards.server import make_server
from egrpo.testing.rewards import SMALL_REWARDS, save_small_reward

IMAGES = torch.rand(5, 3, 48, 32, generator=torch.Generator().manual_seed(0))
PROMPTS = ['a cat', 'Two dogs, on a red sofa!', 'a cat', 'x' * 200, 'caf\u00e9 \U0001f600']
TIGHT = dict(atol=1e-5, rtol=1e-5)


@pytest.fixture(scope='module')
def places(tmp_path_factory):
    "Name -> folder with small weights."
    folder = tmp_path_factory.mktemp('rewards')
    return {name: save_small_reward(name, folder/name) for name in SMALL_REWARDS}


def norm(w, name, x, eps=1e-5): return F.layer_norm(x, x.shape[-1:], w[f'{name}.weight'], w[f'{name}.bias'], eps)
def linear(w, name, x): return F.linear(x, w[f'{name}.weight'], w[f'{name}.bias'])


def attention(q, k, v, heads, causal=False):
    "Attention by its formula, in fp64."
    def apart(x): return x.double().unflatten(-1, (heads, -1)).transpose(1, 2)
    q, k, v = apart(q), apart(k), apart(v)
    logits = q @ k.mT / math.sqrt(q.shape[-1])
    if causal: logits = logits.masked_fill(torch.ones(logits.shape[-2:]).triu(1).bool(), -math.inf)
    return (logits.softmax(-1) @ v).transpose(1, 2).flatten(2).float()


def quick_gelu(x): return x * torch.sigmoid(1.702 * x)


# --- CLIP in open_clip's layout: HPS

def open_clip_tower(w, before, x, causal=False, act=F.gelu):
    "Blocks of open_clip."
    for i in range(2):
        name = f'{before}transformer.resblocks.{i}'
        h = norm(w, f'{name}.ln_1', x)
        q, k, v = F.linear(h, w[f'{name}.attn.in_proj_weight'], w[f'{name}.attn.in_proj_bias']).chunk(3, -1)
        x = x + linear(w, f'{name}.attn.out_proj', attention(q, k, v, 16, causal))
        x = x + linear(w, f'{name}.mlp.c_proj', act(linear(w, f'{name}.mlp.c_fc', norm(w, f'{name}.ln_2', x))))
    return x


def open_clip_cosine(w, pixels, ids, act=F.gelu):
    "Cosine of images and texts; a text's vector is that of its highest id."
    x = F.conv2d(pixels, w['visual.conv1.weight'], stride=14).flatten(2).mT
    x = torch.cat([w['visual.class_embedding'].expand(len(x), 1, -1), x], 1) + w['visual.positional_embedding']
    x = open_clip_tower(w, 'visual.', norm(w, 'visual.ln_pre', x), act=act)
    image = norm(w, 'visual.ln_post', x[:, 0]) @ w['visual.proj']
    y = w['token_embedding.weight'][ids] + w['positional_embedding'][:ids.shape[1]]
    y = norm(w, 'ln_final', open_clip_tower(w, '', y, causal=True, act=act))
    text = y[torch.arange(len(y)), ids.argmax(-1)] @ w['text_projection']
    return F.cosine_similarity(image, text)


def byte_ids(prompts, length=77):
    "Ids of the small CLIP tokenizer: a character is a token, the last of a word another one; padded with zeros, as open_clip does."
    import re

    from transformers.convert_slow_tokenizer import bytes_to_unicode
    marks = {b: i for i, b in enumerate(bytes_to_unicode())}
    out = torch.zeros(len(prompts), length, dtype=torch.long)
    for row, prompt in zip(out, prompts):
        ids = [512]
        for word in re.findall(r"'s|'t|'re|'ve|'m|'ll|'d|[^\W\d_]+|\d|[^\s\w]+", prompt.lower()):
            data = [marks[b] for b in word.encode()]
            ids += [*data[:-1], data[-1] + 256]
        ids = [*ids[:length - 1], 513]
        row[:len(ids)] = torch.tensor(ids)
    return out


@pytest.mark.parametrize('name', ['hpsv2.1', 'hpsv2.0'])
def test_hps_is_the_cosine_of_an_open_clip(places, name):
    w = read_weights(places[name]/REWARD_MODELS[name].file)
    ours = RewardModel(name, str(places[name]))(IMAGES, PROMPTS)
    pixels, ids = fit_in(IMAGES, 28), byte_ids(PROMPTS)
    assert_close(ours, open_clip_cosine(w, pixels, ids), **TIGHT)
    wrongs = dict(act=open_clip_cosine(w, pixels, ids, quick_gelu), cut=open_clip_cosine(w, cut_out(IMAGES, 28), ids),
                  text=open_clip_cosine(w, pixels, ids.roll(1, 0)))
    for what, wrong in wrongs.items(): assert (ours - wrong).abs().max() > 1e-4, f'the oracle would not notice another {what}'


def test_versions_of_hps_have_files_of_their_own(places):
    a, b = (RewardModel(o, str(places[o]))(IMAGES, PROMPTS) for o in ('hpsv2.1', 'hpsv2.0'))
    assert (a - b).abs().max() > 1e-3
    assert REWARD_MODELS['hpsv2.1'].file == 'HPS_v2.1_compressed.pt' and REWARD_MODELS['hpsv2.0'].file == 'HPS_v2_compressed.pt'


# --- CLIP in transformers' layout: PickScore, aesthetic

def clip_tower(w, before, x, causal=False, act=F.gelu):
    "Blocks of transformers' CLIP."
    for i in range(2):
        name = f'{before}.encoder.layers.{i}'
        h = norm(w, f'{name}.layer_norm1', x)
        q, k, v = (linear(w, f'{name}.self_attn.{o}_proj', h) for o in 'qkv')
        x = x + linear(w, f'{name}.self_attn.out_proj', attention(q, k, v, 16, causal))
        x = x + linear(w, f'{name}.mlp.fc2', act(linear(w, f'{name}.mlp.fc1', norm(w, f'{name}.layer_norm2', x))))
    return x


def clip_image(w, pixels, act=F.gelu):
    "Image vectors of length 1."
    e = 'vision_model.embeddings'
    x = F.conv2d(pixels, w[f'{e}.patch_embedding.weight'], stride=14).flatten(2).mT
    x = torch.cat([w[f'{e}.class_embedding'].expand(len(x), 1, -1), x], 1) + w[f'{e}.position_embedding.weight']
    x = clip_tower(w, 'vision_model', norm(w, 'vision_model.pre_layrnorm', x), act=act)
    return F.normalize(norm(w, 'vision_model.post_layernorm', x[:, 0]) @ w['visual_projection.weight'].T, dim=-1)


def clip_text(w, ids):
    "Text vectors of length 1, taken at the first end mark."
    y = w['text_model.embeddings.token_embedding.weight'][ids] + w['text_model.embeddings.position_embedding.weight'][:ids.shape[1]]
    y = norm(w, 'text_model.final_layer_norm', clip_tower(w, 'text_model', y, causal=True))
    return F.normalize(y[torch.arange(len(y)), (ids == 513).int().argmax(-1)] @ w['text_projection.weight'].T, dim=-1)


def test_pickscore_is_a_cosine(places):
    "Its own code: exp(logit_scale)·cosine, with a scale of 100 after training; ours leaves the scale out, as the papers' tables do."
    w = read_weights(places['pickscore']/'model.safetensors')
    ours = RewardModel('pickscore', str(places['pickscore']))(IMAGES, PROMPTS)
    image, text = clip_image(w, cut_out(IMAGES, 28)), clip_text(w, byte_ids(PROMPTS))
    assert_close(ours, (image * text).sum(-1), **TIGHT)
    scaled = torch.exp(w['logit_scale']) * (text @ image.T).diag()
    assert_close(ours * torch.exp(w['logit_scale']), scaled, atol=1e-3, rtol=1e-5)
    assert (ours - (clip_image(w, cut_out(IMAGES, 28), quick_gelu) * text).sum(-1)).abs().max() > 1e-4


def test_aesthetic_is_a_head_on_the_image_vector(places):
    "Five linear layers without activations are one matrix and one vector."
    w, h = read_weights(places['aesthetic']/'model.safetensors'), read_weights(places['aesthetic']/'aesthetic-model.pth')
    matrix, vector = np.eye(24), np.zeros(24)
    for i in (0, 2, 4, 6, 7):
        weight, bias = h[f'layers.{i}.weight'].double().numpy(), h[f'layers.{i}.bias'].double().numpy()
        matrix, vector = weight @ matrix, weight @ vector + bias
    expected = clip_image(w, cut_out(IMAGES, 28), quick_gelu).double().numpy() @ matrix.T + vector
    reward = RewardModel('aesthetic', str(places['aesthetic']))
    assert_close(reward(IMAGES, PROMPTS).double(), torch.from_numpy(expected[:, 0]), **TIGHT)
    assert_close(reward(IMAGES, ['other'] * 5), reward(IMAGES, PROMPTS), atol=0, rtol=0)


def test_clip_score_heeds_the_config_beside_it(places, tmp_path):
    w = read_weights(places['clip_score']/'open_clip_pytorch_model.bin')
    pixels, ids = cut_out(IMAGES, 28), byte_ids(PROMPTS)
    assert_close(RewardModel('clip_score', str(places['clip_score']))(IMAGES, PROMPTS), open_clip_cosine(w, pixels, ids), **TIGHT)
    for f in places['clip_score'].iterdir(): (tmp_path/f.name).write_bytes(f.read_bytes())
    config = '{"model_cfg": {"quick_gelu": true, "vision_cfg": {"head_width": 4}, "text_cfg": {"heads": 16}}}'
    (tmp_path/'open_clip_config.json').write_text(config)
    quick = open_clip_cosine(w, pixels, ids, quick_gelu)
    assert_close(RewardModel('clip_score', str(tmp_path))(IMAGES, PROMPTS), quick, **TIGHT)


# --- ImageReward: torch's own encoder and decoder layers

def torch_image_block(w, name):
    "A block of BLIP's vision transformer as torch has it."
    block = nn.TransformerEncoderLayer(64, 16, 128, 0, 'gelu', layer_norm_eps=1e-6, batch_first=True, norm_first=True).eval()
    pairs = dict(norm1='norm1', norm2='norm2', linear1='mlp.fc1', linear2='mlp.fc2') | {'self_attn.out_proj': 'attn.proj'}
    own = {f'{a}.{o}': w[f'{name}.{b}.{o}'] for a, b in pairs.items() for o in ('weight', 'bias')}
    block.load_state_dict(own | {f'self_attn.in_proj_{o}': w[f'{name}.attn.qkv.{o}'] for o in ('weight', 'bias')})
    return block


def bert_attention(w, name, x, seen, mask=None):
    "BERT's attention with what follows it: 12 heads, a norm after the sum."
    def apart(x): return x.unflatten(-1, (12, -1)).transpose(1, 2)
    q, k, v = (linear(w, f'{name}.self.{o}', y) for o, y in (('query', x), ('key', seen), ('value', seen)))
    out = F.scaled_dot_product_attention(apart(q), apart(k), apart(v), attn_mask=mask).transpose(1, 2).flatten(2)
    return norm(w, f'{name}.output.LayerNorm', linear(w, f'{name}.output.dense', out) + x, 1e-12)


def image_reward(w, pixels, ids, mask, cross=True):
    "ImageReward by the published names."
    image, text = 'blip.visual_encoder', 'blip.text_encoder'
    x = F.conv2d(pixels, w[f'{image}.patch_embed.proj.weight'], w[f'{image}.patch_embed.proj.bias'], stride=16).flatten(2).mT
    x = torch.cat([w[f'{image}.cls_token'].expand(len(x), -1, -1), x], 1) + w[f'{image}.pos_embed']
    for i in range(2): x = torch_image_block(w, f'{image}.blocks.{i}')(x)
    seen = norm(w, f'{image}.norm', x, 1e-6)
    y = w[f'{text}.embeddings.word_embeddings.weight'][ids] + w[f'{text}.embeddings.position_embeddings.weight'][:ids.shape[1]]
    y = norm(w, f'{text}.embeddings.LayerNorm', y, 1e-12)
    for i in range(2):
        name = f'{text}.encoder.layer.{i}'
        y = bert_attention(w, f'{name}.attention', y, y, mask[:, None, None].bool())
        if cross: y = bert_attention(w, f'{name}.crossattention', y, seen)
        h = linear(w, f'{name}.output.dense', F.gelu(linear(w, f'{name}.intermediate.dense', y)))
        y = norm(w, f'{name}.output.LayerNorm', h + y, 1e-12)
    y = y[:, 0]
    for i in (0, 2, 4, 6, 7): y = linear(w, f'mlp.layers.{i}', y)
    return (y[:, 0] - .16717362830052426) / 1.0333394966054072


def letter_ids(prompts, length=35):
    "Ids of the small BERT tokenizer, padded to the length ImageReward's own code pads to; accents go, what is no letter is unknown."
    import re
    import unicodedata
    out = torch.zeros(len(prompts), length, dtype=torch.long)
    for row, prompt in zip(out, prompts):
        plain = ''.join(o for o in unicodedata.normalize('NFD', prompt.lower()) if not unicodedata.combining(o))
        ids = [2]
        for word in re.findall(r'[a-z]+|[^\sa-z]', plain):
            letters = [ord(o) - 97 for o in word] if word.isalpha() and len(word) <= 100 else None
            ids += [5 + letters[0], *[31 + o for o in letters[1:]]] if letters else [1]
        ids = [*ids[:length - 1], 3]
        row[:len(ids)] = torch.tensor(ids)
    return out


def test_imagereward_is_its_formula(places):
    w = read_weights(places['imagereward']/'ImageReward.pt')
    prompts = [*PROMPTS[:3], 'word ' * 40, PROMPTS[4]]
    ours = RewardModel('imagereward', str(places['imagereward']))(IMAGES, prompts)
    ids, pixels = letter_ids(prompts), cut_out(IMAGES, 32)
    with torch.no_grad():
        assert_close(ours, image_reward(w, pixels, ids, ids != 0), **TIGHT)
        assert (ours - image_reward(w, pixels, ids, torch.ones_like(ids))).abs().max() > 1e-4, 'padding must not be seen'
        assert (ours - image_reward(w, pixels, ids, ids != 0, cross=False)).abs().max() > 1e-4, 'the image must be seen'
    assert (IMAGE_REWARD_MEAN, IMAGE_REWARD_STD) == (.16717362830052426, 1.0333394966054072)


def test_imagereward_ignores_what_it_does_not_use(places):
    "The published file has BLIP's projections and position ids as well."
    w = read_weights(places['imagereward']/'ImageReward.pt')
    more = {'blip.vision_proj.weight': torch.ones(2, 2), 'blip.text_encoder.embeddings.position_ids': torch.arange(4)[None]}
    from transformers import BertTokenizer
    tokenizer = load_tokenizer(places['imagereward'], BertTokenizer, '')
    assert_close(ImageReward(w | more, tokenizer)(IMAGES, PROMPTS), ImageReward(w, tokenizer)(IMAGES, PROMPTS), atol=0, rtol=0)


# --- pictures

@pytest.mark.parametrize('size', [(224, 224), (64, 64), (96, 160), (512, 300)])
def test_cut_out_is_what_pillow_makes(size):
    "The preparation of OpenAI's CLIP and of ImageReward by Pillow itself."
    from PIL import Image
    pixels = np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8)
    h, w = (int(o * 224 / min(size)) for o in size)
    picture = Image.fromarray(pixels).resize((w, h), Image.Resampling.BICUBIC)
    left, top = (w - 224) // 2, (h - 224) // 2
    theirs = torch.from_numpy(np.array(picture.crop((left, top, left + 224, top + 224)))).permute(2, 0, 1).float()
    mean, std = torch.tensor([.48145466, .4578275, .40821073]), torch.tensor([.26862954, .26130258, .27577711])
    ours = (cut_out(torch.from_numpy(pixels).permute(2, 0, 1)[None] / 255)[0] * std[:, None, None] + mean[:, None, None]) * 255
    assert (ours - theirs).abs().max() < 2.01 and (ours - theirs).abs().mean() < .02


@pytest.mark.parametrize('size', [(64, 64), (96, 160), (512, 300)])
def test_squash_is_what_pillow_makes(size):
    "The preparation that open_clip's configuration calls so, by Pillow itself, one direction after the other."
    from PIL import Image
    pixels = np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8)
    picture = Image.fromarray(pixels).resize((224, size[0]), Image.Resampling.BICUBIC) # across first: Pillow 13 may begin with the other
    theirs = torch.from_numpy(np.array(picture.resize((224, 224), Image.Resampling.BICUBIC))).permute(2, 0, 1).float()
    mean, std = torch.tensor([.48145466, .4578275, .40821073]), torch.tensor([.26862954, .26130258, .27577711])
    ours = (squash(torch.from_numpy(pixels).permute(2, 0, 1)[None] / 255)[0] * std[:, None, None] + mean[:, None, None]) * 255
    assert (ours - theirs).abs().max() < 2.01 and (ours - theirs).abs().mean() < .02


@pytest.mark.parametrize('size', [(64, 64), (30, 61), (500, 333), (224, 224)])
def test_fit_in_keeps_everything(size):
    "A white image leaves a white box in the middle, black around it."
    box = fit_in(torch.ones(1, 3, *size))[0] * torch.tensor([.26862954, .26130258, .27577711])[:, None, None]
    white = (box[0] + .48145466) > .5
    rows, columns = white.any(1).nonzero().flatten(), white.any(0).nonzero().flatten()
    h, w = (round(o * 224 / max(size)) for o in size)
    assert (len(rows), len(columns)) == (h, w) and white.sum() == h * w
    assert abs((rows[0] - (223 - rows[-1])).item()) <= 1 and abs((columns[0] - (223 - columns[-1])).item()) <= 1


# --- batches, files, mistakes

@pytest.mark.parametrize('name', SMALL_REWARDS)
def test_scores_do_not_depend_on_the_batch(places, name, monkeypatch):
    from egrpo.rewards import published as reward_models
    reward = RewardModel(name, str(places[name]))
    whole = torch.as_tensor(reward(IMAGES, PROMPTS))
    monkeypatch.setattr(reward_models, 'BATCH', 2)
    assert_close(torch.as_tensor(reward(IMAGES, PROMPTS)), whole, **TIGHT)
    order = torch.tensor([3, 1, 4, 0, 2])
    assert_close(torch.as_tensor(reward(IMAGES[order], [PROMPTS[i] for i in order])), whole[order], **TIGHT)


def test_prompts_are_embedded_once(places):
    reward = ClipReward(load_clip(places['pickscore']), load_tokenizer(places['pickscore'], None, ''))
    lengths = []
    hook = reward.model.text_model.register_forward_hook(lambda m, a, k, out: lengths.append(len(k['input_ids'])), with_kwargs=True)
    try: reward.text_features(['a', 'b', 'a', 'a'])
    finally: hook.remove()
    assert lengths == [2]


def test_loads_once_and_lazily(places):
    spec = ' + '.join(f'{name}({places[name]})' for name in SMALL_REWARDS)
    load_reward.cache_clear()
    a, b = get_reward(spec), get_reward(spec)
    assert load_reward.cache_info().misses == 0
    a(IMAGES, PROMPTS), b(IMAGES, PROMPTS), a(IMAGES, PROMPTS)
    assert load_reward.cache_info().misses == len(SMALL_REWARDS)
    assert a.names == list(SMALL_REWARDS)


def test_safetensors_stand_in_for_pickles(places, tmp_path):
    for f in places['hpsv2.1'].iterdir():
        if f.suffix != '.pt': (tmp_path/f.name).write_bytes(f.read_bytes())
    file = to_safetensors(places['hpsv2.1']/'HPS_v2.1_compressed.pt', tmp_path/'HPS_v2.1_compressed.safetensors')
    expected = RewardModel('hpsv2.1', str(places['hpsv2.1']))(IMAGES, PROMPTS)
    for place in (file, tmp_path): assert_close(RewardModel('hpsv2.1', str(place))(IMAGES, PROMPTS), expected, atol=0, rtol=0)


def test_nothing_is_unpickled(tmp_path):
    class Trap:
        def __reduce__(self): return (tmp_path/'sprung').touch, ()
    torch.save({'state_dict': {'visual.proj': Trap()}}, tmp_path/'HPS_v2.1_compressed.pt')
    with pytest.raises(RewardError, match='plain tensors') as e: RewardModel('hpsv2.1', str(tmp_path))(IMAGES, PROMPTS)
    assert not (tmp_path/'sprung').exists() and '\n' not in str(e.value)


@pytest.mark.parametrize('name, other, message', [
    ('hpsv2.1', 'imagereward', 'no visual.conv1.weight'), ('imagereward', 'hpsv2.1', 'not the weights of ImageReward'),
    ('aesthetic', 'hpsv2.0', 'not the weights of a head'), ('clip_score', 'imagereward', 'no visual.conv1.weight'),
])
def test_another_rewards_weights_are_refused(places, name, other, message, tmp_path):
    "By the file's name, and under no name by its tensors."
    file, folder = REWARD_MODELS[other].file, places[other]
    with pytest.raises(RewardError, match=f"reward '{name}': '{file}' in .* is of {other}: put {REWARD_MODELS[name].file} there") as e:
        get_reward(f'{name}({folder})')(IMAGES, PROMPTS)
    assert '\n' not in str(e.value)
    place = shutil.copytree(folder, tmp_path/'it')/file
    place = place.rename(place.with_stem('weights'))
    with pytest.raises(RewardError, match=f"reward '{name}': .*{message}") as e: get_reward(f'{name}({place})')(IMAGES, PROMPTS)
    assert '\n' not in str(e.value)


@pytest.mark.parametrize('name, other', [
    ('hpsv2.1', 'hpsv2.0'), ('hpsv2.0', 'hpsv2.1'), ('clip_score', 'hpsv2.1'), ('pickscore', 'hpsv2.0')])
def test_one_version_of_hps_is_not_taken_for_another(places, tmp_path, name, other):
    "Their tensors have the same names and shapes: only the file's name tells."
    published = places[other]/REWARD_MODELS[other].file
    link, moved = tmp_path/'link'/published.name, tmp_path/'moved'
    for o in (link.parent, moved): o.mkdir()
    link.symlink_to(published) # as in the hub's cache
    to_safetensors(published, moved/f'{published.stem}.safetensors')
    for place in (places[other], published, link, moved, moved/f'{published.stem}.safetensors'):
        with pytest.raises(RewardError, match=f"'{name}': '{published.stem}.* is of {other}: put") as e:
            get_reward(f'{name}({place})')(IMAGES, PROMPTS)
        assert '\n' not in str(e.value)
    both = shutil.copytree(places[name], tmp_path/'both')
    shutil.copy(published, both)
    assert_close(RewardModel(name, str(both))(IMAGES, PROMPTS), RewardModel(name, str(places[name]))(IMAGES, PROMPTS), atol=0, rtol=0)


def test_a_link_to_weights_keeps_what_lies_beside_it(places, tmp_path):
    "As the hub's cache has it: named links beside one another, contents elsewhere under numbers."
    (tmp_path/'blobs').mkdir(), (tmp_path/'snapshot').mkdir()
    for i, f in enumerate(sorted(places['clip_score'].iterdir())):
        (tmp_path/'snapshot'/f.name).symlink_to(shutil.copy(f, tmp_path/'blobs'/str(i)))
    file = tmp_path/'snapshot/open_clip_pytorch_model.bin'
    expected = RewardModel('clip_score', str(places['clip_score']))(IMAGES, PROMPTS)
    assert_close(RewardModel('clip_score', str(file))(IMAGES, PROMPTS), expected, atol=0, rtol=0)


def without(*starts): return lambda w: {k: v for k, v in w.items() if not k.startswith(starts)}
def custom_text(w): return {k if k.startswith(('visual', 'logit')) else f'text.{k}': v for k, v in w.items()}


@pytest.mark.parametrize('change, lacks', [
    (custom_text, 'token_embedding.weight'), (without('visual.positional', 'visual.transformer'), 'visual.positional_embedding'),
    (without('visual.proj'), 'visual.proj'), (without('text_projection'), 'text_projection'),
    (lambda w: {f'module.{k}': v for k, v in w.items()}, 'visual.conv1.weight'),
], ids=['custom text tower', 'ResNet', 'no projection', 'no projection of texts', 'prefixed'])
@pytest.mark.parametrize('name', ['clip_score', 'hpsv2.1'])
def test_other_layouts_of_open_clip_are_refused(places, tmp_path, name, change, lacks):
    "By the file, the tensor it lacks, and the layout that is read."
    file = shutil.copytree(places[name], tmp_path/'it')/REWARD_MODELS[name].file
    torch.save(change(read_weights(file)), file)
    says = f"'{file.name}' is no CLIP of open_clip with a vision transformer .* it has no {lacks} "
    with pytest.raises(RewardError, match=says) as e: get_reward(f'{name}({file.parent})')(IMAGES, PROMPTS)
    assert '\n' not in str(e.value)


def test_heads_are_not_guessed(places, tmp_path):
    "A ViT-B has 12 and 8, HPS 16 and 16, and no tensor says so; nor whether gelu is the quick one. What lies beside a file counts, too."
    folder = shutil.copytree(places['clip_score'], tmp_path/'it')
    file, said = folder/'open_clip_pytorch_model.bin', folder/'open_clip_config.json'
    w, pixels, ids = read_weights(file), cut_out(IMAGES, 28), byte_ids(PROMPTS)
    own = json.loads(said.read_text())['model_cfg']
    said.write_text(json.dumps(dict(model_cfg=own | dict(quick_gelu=True))))
    for place in (folder, file):
        assert_close(RewardModel('clip_score', str(place))(IMAGES, PROMPTS), open_clip_cosine(w, pixels, ids, quick_gelu), **TIGHT)
    vision, text = dict(own['vision_cfg'], pool_type='avg'), dict(own['text_cfg'], no_causal_mask=True)
    wrongs = {'heads and activation of .* put the model.s open_clip_config.json beside it': dict(vision_cfg=vision),
              'asks for vision_cfg.pool_type': own | dict(vision_cfg=vision), 'asks for text_cfg.no_causal_mask': own | dict(text_cfg=text)}
    for i, (message, model) in enumerate(wrongs.items()):
        other = shutil.copytree(folder, tmp_path/str(i))
        (other/said.name).write_text(json.dumps(dict(model_cfg=model)))
        with pytest.raises(RewardError, match=message): get_reward(f'clip_score({other})')(IMAGES, PROMPTS)
    said.unlink()
    load_clip.cache_clear(), load_reward.cache_clear()
    for place in (folder, file):
        with pytest.raises(RewardError, match='heads and activation of'): get_reward(f'clip_score({place})')(IMAGES, PROMPTS)


def test_hps_does_not_heed_the_configuration_of_a_clip_beside_it(places, tmp_path):
    "One folder for all rewards: HPS stays a ViT-H with gelu."
    folder = shutil.copytree(places['hpsv2.1'], tmp_path/'all')
    model = dict(quick_gelu=True, vision_cfg=dict(head_width=8), text_cfg=dict(heads=8))
    (folder/'open_clip_config.json').write_text(json.dumps(dict(model_cfg=model, preprocess_cfg=dict(mean=[0, 0, 0]))))
    expected = RewardModel('hpsv2.1', str(places['hpsv2.1']))(IMAGES, PROMPTS)
    assert_close(RewardModel('hpsv2.1', str(folder))(IMAGES, PROMPTS), expected, atol=0, rtol=0)


@pytest.mark.parametrize('name', SMALL_REWARDS)
def test_an_empty_folder_and_a_cut_file(places, name, tmp_path):
    with pytest.raises(RewardError, match='holds no weights: put'): get_reward(f'{name}({tmp_path})')(IMAGES, PROMPTS)
    (tmp_path/'weights.pt').write_bytes(b'PK\x03\x04 half a file')
    with pytest.raises(RewardError, match='plain tensors|no CLIP'): get_reward(f'{name}({tmp_path/"weights.pt"})')(IMAGES, PROMPTS)


@pytest.mark.parametrize('name', [o for o, p in REWARD_MODELS.items() if p.repo])
def test_without_a_network_the_message_says_what_to_fetch(name, monkeypatch, tmp_path):
    monkeypatch.setattr('huggingface_hub.constants.HF_HUB_OFFLINE', True)
    monkeypatch.setattr('huggingface_hub.constants.HF_HUB_CACHE', str(tmp_path))
    load_reward.cache_clear()
    with pytest.raises(RewardError) as e: get_reward(name)(IMAGES, PROMPTS)
    said, known = str(e.value), REWARD_MODELS[name]
    assert all(o in said for o in (f"reward '{name}'", f'hf download {known.repo}', known.file, f'{name}(/path/')) and '\n' not in said


@pytest.fixture
def hub(monkeypatch, tmp_path):
    "A hub of local folders: repository -> folder; what was asked of it is kept."
    repos, asked = {}, []
    def snapshot(repo, allow_patterns):
        asked.append((repo, list(allow_patterns)))
        if repo not in repos: raise OSError(f'404 for {repo}')
        place = tmp_path/repo.replace('/', '--')
        place.mkdir(exist_ok=True)
        for f in allow_patterns:
            if (repos[repo]/f).is_file(): shutil.copy(repos[repo]/f, place)
        return str(place)
    monkeypatch.setattr('huggingface_hub.snapshot_download', snapshot)
    load_reward.cache_clear()
    load_clip.cache_clear()
    yield repos, asked
    load_reward.cache_clear()
    load_clip.cache_clear()


@contextmanager
def serving(server):
    "A server in a thread; inside, its address."
    threading.Thread(target=server.serve_forever, kwargs=dict(poll_interval=.05), daemon=True).start()
    try: yield f'http://127.0.0.1:{server.server_port}'
    finally: server.shutdown(), server.server_close()


@pytest.mark.parametrize('name', [o for o, p in REWARD_MODELS.items() if p.repo])
def test_a_gated_repository_asks_for_the_licence(name, monkeypatch, tmp_path):
    "The hub as it answers who has not accepted a licence: 403, GatedRepo."
    class Gate(BaseHTTPRequestHandler):
        def log_message(self, *args): pass
        def do_GET(self):
            self.send_response(403)
            for k, v in {'X-Error-Code': 'GatedRepo', 'Content-Length': '0'}.items(): self.send_header(k, v)
            self.end_headers()
        do_HEAD = do_GET

    monkeypatch.setattr('huggingface_hub.constants.HF_HUB_OFFLINE', False)
    monkeypatch.setattr('huggingface_hub.constants.HF_HUB_CACHE', str(tmp_path))
    known = REWARD_MODELS[name]
    load_reward.cache_clear()
    with serving(ThreadingHTTPServer(('127.0.0.1', 0), Gate)) as url:
        real = partial(huggingface_hub.snapshot_download, endpoint=url, cache_dir=tmp_path)
        monkeypatch.setattr('huggingface_hub.snapshot_download', real)
        with pytest.raises(RewardError) as e: get_reward(name)(IMAGES, PROMPTS)
    said = str(e.value)
    assert f"{known.repo} is gated: accept the licence at https://huggingface.co/{known.repo} and log in (`hf auth login`), or" in said
    assert f'{name}(/path/of/' in said and '\n' not in said


@pytest.mark.parametrize('name', SMALL_REWARDS)
def test_from_the_hub(places, hub, name, tmp_path):
    "The published repository has no tokenizer of ours, and the file is fetched by its name alone."
    repos, asked = hub
    known, bare = REWARD_MODELS[name], tmp_path/'bare'
    without = ['tokenizer*', *(['model*', 'config.json'] if name == 'aesthetic' else [])]
    shutil.copytree(places[name], bare, ignore=shutil.ignore_patterns(*without))
    repos |= {'openai/clip-vit-large-patch14': places['aesthetic'], 'google-bert/bert-base-uncased': places['imagereward']}
    repos[known.repo] = bare
    assert_close(RewardModel(name)(IMAGES, PROMPTS), RewardModel(name, str(places[name]))(IMAGES, PROMPTS))
    assert asked[0] == (known.repo, [*([known.file] if known.file else []), *known.also])


def test_anothers_clip_from_the_hub_in_either_layout(places, hub):
    repos, asked = hub
    repos |= {'me/open': places['clip_score'], 'me/closed': places['pickscore']}
    for repo, place in repos.items():
        assert_close(RewardModel('clip_score', repo)(IMAGES, PROMPTS), RewardModel('clip_score', str(place))(IMAGES, PROMPTS))
    with pytest.raises(RewardError, match="reward 'clip_score': me/nothing could not be downloaded .404"):
        RewardModel('clip_score', 'me/nothing')(IMAGES, PROMPTS)


def test_missing_packages_are_named(places, monkeypatch):
    import sys
    load_reward.cache_clear()
    monkeypatch.setitem(sys.modules, 'ftfy', None)
    monkeypatch.setitem(sys.modules, 'rapidocr_onnxruntime', None)
    with pytest.raises(RewardError, match=r'pip install egrpo\[hpsv2\]'): get_reward(f"hpsv2.1({places['hpsv2.1']})")(IMAGES, PROMPTS)
    with pytest.raises(RewardError, match=r'pip install egrpo\[ocr\]'): get_reward('ocr')(IMAGES, ['"a"'] * 5)


# --- training

@pytest.fixture(scope='module')
def pipelines(tmp_path_factory):
    "Name -> folder with a small pipeline, each made once."
    from egrpo.testing.pipelines import small_pipeline
    folder = tmp_path_factory.mktemp('pipelines')
    @cache
    def place(name):
        small_pipeline(name).save_pretrained(folder/name)
        return folder/name
    return place


@pytest.mark.parametrize('rank', [2, 0], ids=['LoRA', 'whole'])
@pytest.mark.parametrize('model', ['flux-dev', 'flux-schnell', 'sd3'])
def test_three_iterations_on_every_reward(places, pipelines, tmp_path, model, rank):
    "All of them at once, through a configuration: published ones, a server, and in one case OCR, if it is installed; it takes its time."
    from egrpo.train.trainer import TrainConfig, Trainer
    reads = (model, rank) == ('flux-dev', 2) and find_spec('rapidocr_onnxruntime')
    names = [*places, 'server', *(['ocr'] if reads else [])]
    prompts = tmp_path/'prompts.txt'
    prompts.write_text('a red sign that says "STOP"\na blue sign that says "GO"\n')
    with serving(make_server(lambda images, prompts: images.mean((1, 2, 3)), port=0)) as url:
        at = places | dict(server=url)
        spec = ' + '.join(f'{i + 1}*{name}' + (f'({at[name]})' if name in at else '') for i, name in enumerate(names))
        config = TrainConfig(model=str(pipelines(model)), prompts=str(prompts), reward=spec, num_steps=6, active_steps=2, num_generations=3,
                             prompts_per_iteration=2, iterations=3, eval_size=2, eval_every=0, lora_rank=rank, device='cpu',
                             out=str(tmp_path/'run'))
        trainer = Trainer(config)
        before = {k: p.detach().clone() for k, p in trainer.parameters.items()}
        history = trainer.fit()
    lines = [json.loads(o) for o in (tmp_path/'run/metrics.jsonl').read_text().splitlines()]
    assert len(lines) == 3 and set(names) <= set(history.columns)
    for line in lines:
        assert all(math.isfinite(line[f'reward/{name}']) for name in names) and line['ratio_error'] < 1e-6
    assert any((p.detach() - before[k]).abs().max() > 0 for k, p in trainer.parameters.items()), 'nothing was trained'


def test_the_flux_scale(places, tmp_path, monkeypatch):
    "One setting leads from the miniature to HPD's prompts, HPS and the paper's four scores; here its model and rewards are small."
    from dataclasses import replace

    from egrpo.paper import cells, claims, comparisons, experiments, records
    from egrpo.rewards.published import HPD_STYLES
    from egrpo.testing.pipelines import small_pipeline
    small_pipeline('flux-dev').save_pretrained(tmp_path/'flux')
    benchmark = tmp_path/'hps/datasets/benchmark'
    benchmark.mkdir(parents=True)
    for style in HPD_STYLES: (benchmark/f'{style}.json').write_text(json.dumps([f'{style} of a red circle {i}' for i in range(800)]))
    monkeypatch.setenv('HPS_ROOT', str(tmp_path/'hps'))
    scale = records.get_scale('flux')
    names = scale.settings['eval_rewards'].split(' + ')
    rewards = [f'{name}({places[name]})' for name in names]
    assert names[0] == scale.settings['reward'] and set(names) <= set(SMALL_REWARDS)
    small = dict(model=str(tmp_path/'flux'), reward=rewards[0], eval_rewards=' + '.join(rewards), resolution=None, iterations=1,
                 prompts_per_iteration=1, num_generations=2, eval_size=4, device='cpu', dtype='fp32')
    monkeypatch.setitem(records.SCALES, 'flux', replace(scale, settings=scale.settings | small))
    path = experiments.reproduce('merge_length', 'flux', 0, tmp_path/'cells', tmp_path/'merge_length.json', only=['6', 'adaptive'])
    record = json.loads(path.read_text())
    assert record['scale'] == 'flux' and comparisons.rewards_of(record['data']) == names
    for over, seeds in ((('6',), 1), (None, 0)): # the other two merge lengths were left out
        assert [claims.best(record['data'], place, over).verdict for place in range(4)] == [f'open ({seeds} of 5 seeds)'] * 4
    kept = cells.load_cell(next((tmp_path/'cells').glob('*.json')))
    assert set(kept['shown']['prompts']) < {f'{style} of a red circle {i}' for style in HPD_STYLES for i in range(800)}
    assert len(kept['images']) == 4 and kept['ratio_error'] < 1e-6
    with pytest.raises(ValueError, match='no verifier'): experiments.reproduce('reward_hacking', 'flux', 0, tmp_path/'cells')


# --- letters in images

def sign(text, side=192):
    "A white sign with black letters."
    from PIL import Image, ImageDraw, ImageFont
    picture = Image.new('RGB', (side, side), 'white')
    ImageDraw.Draw(picture).text((side / 2, side / 2), text, 'black', ImageFont.load_default(size=side // 5), anchor='mm')
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1) / 255


def test_ocr_reads_signs():
    pytest.importorskip('rapidocr_onnxruntime', reason='pip install egrpo[ocr]')
    images = torch.stack([sign('Open'), sign('Cafe'), sign('')])
    assert OcrReward().read(images[0]).lower() == 'open'
    right, wrong, blank = get_reward('ocr')(images, ['a shop sign that says "Open"'] * 3)['ocr']
    assert right == 1 and wrong < .6 and blank == 0


def test_ocr_needs_quotes():
    pytest.importorskip('rapidocr_onnxruntime', reason='pip install egrpo[ocr]')
    with pytest.raises(RewardError, match="double quotes, and prompt 'a shop' has none"): get_reward('ocr')(sign('a')[None], ['a shop'])
