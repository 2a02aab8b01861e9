"""Our HPS against the package hpsv2's own code: its model, preparation, tokenizer and `score`, on small random weights of the same layout.

The package needs an arrangement of its own (nbs/guides/your_own_reward.ipynb); where it is not installed, these are skipped, and
test_reward_models.py still compares with the formula."""
import importlib
import sys
from importlib.util import find_spec

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from egrpo.rewards.published import ClipReward, clean_prompt, cut_out, fit_in, load_clip, load_tokenizer

pytest.importorskip('ftfy', reason='pip install egrpo[hpsv2]')
if not find_spec('hpsv2'): pytest.skip('the package hpsv2 is not installed', allow_module_level=True)


def operators():
    "torchvision for CUDA beside torch for the CPU lacks compiled operators, which nothing here uses: give them names, so that it imports."
    try: importlib.import_module('torchvision')
    except RuntimeError:
        for name in [o for o in sys.modules if o.startswith('torchvision')]: del sys.modules[name]
        library = torch.library.Library('torchvision', 'DEF')
        for name in ('nms', 'qnms'): library.define(f'{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor')
        return library


try:
    library = operators() # kept alive, and the names with it
    hpsv2 = importlib.import_module('hpsv2.img_score')
    CLIP = importlib.import_module('hpsv2.src.open_clip.model').CLIP
    tokenizer = importlib.import_module('hpsv2.src.open_clip.tokenizer')
    image_transform = importlib.import_module('hpsv2.src.open_clip.transform').image_transform
except (ImportError, FileNotFoundError) as e: pytest.skip(f'the package hpsv2 is not installed whole ({e})', allow_module_level=True)

words, tokenize = tokenizer._tokenizer, tokenizer.tokenize
PROMPTS = ['a cat', 'Two dogs, on a red sofa!', "it's 1990 & the \u201cbest\u201d caf\u00e9\u2026", 'a &amp; b &lt;3 caf\u00c3\u00a9',
           'many words ' * 60, '  blanks \n and\tlines ', '\U0001f600 emoji, \u65e5\u672c\u8a9e', "don't we'll I'M", '']


@pytest.fixture(scope='module')
def theirs():
    "A small CLIP of hpsv2's own class: 16 heads in either tower, all of its words."
    torch.manual_seed(0)
    vision = dict(image_size=28, layers=2, width=64, head_width=4, patch_size=14)
    model = CLIP(24, vision, dict(context_length=77, vocab_size=49408, width=32, heads=16, layers=2), output_dict=True).eval()
    for p in model.parameters(): p.data += .1 * torch.randn_like(p)
    return model


@pytest.fixture(scope='module')
def place(theirs, tmp_path_factory):
    "Its weights as published, a tokenizer of transformers beside them."
    from transformers import CLIPTokenizer
    folder = tmp_path_factory.mktemp('hps')
    torch.save({'state_dict': theirs.state_dict()}, folder/'HPS_v2.1_compressed.pt')
    names = {'<start_of_text>': '<|startoftext|>', '<end_of_text>': '<|endoftext|>'}
    merges = sorted(words.bpe_ranks, key=words.bpe_ranks.get)
    CLIPTokenizer({names.get(k, k): i for k, i in words.encoder.items()}, merges, model_max_length=77).save_pretrained(folder)
    return folder


@pytest.fixture(scope='module')
def ours(place):
    "Our reward with these weights."
    from transformers import CLIPTokenizer
    return ClipReward(load_clip(place/'HPS_v2.1_compressed.pt'), load_tokenizer(place, CLIPTokenizer, ''), fit_in, clean_prompt)


def pictures(sizes=((64, 64), (90, 120), (300, 200), (28, 28), (33, 28))):
    "8-bit pictures of several shapes."
    from PIL import Image
    rng = np.random.default_rng(0)
    return [Image.fromarray(rng.integers(0, 256, (*o, 3), dtype=np.uint8)) for o in sizes]


def tensor(picture): return torch.from_numpy(np.array(picture)).permute(2, 0, 1)[None] / 255


@pytest.mark.parametrize('prompt', PROMPTS)
def test_the_same_tokens(ours, prompt):
    ids, end = tokenize([prompt])[0], words.encoder['<end_of_text>']
    mine = ours.tokenizer([clean_prompt(prompt)], truncation=True, max_length=77).input_ids[0]
    assert mine == ids[:ids.tolist().index(end) + 1].tolist()


def test_the_same_preparation():
    prepare = image_transform(224, is_train=False, resize_longest_max=True)
    for picture in pictures(): assert_close(fit_in(tensor(picture))[0], prepare(picture), atol=1e-5, rtol=1e-5)
    assert (cut_out(tensor(pictures()[1]))[0] - prepare(pictures()[1])).abs().max() > .1


def test_the_same_vectors(ours, theirs):
    x = torch.randn(4, 3, 28, 28, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        mine = ours.model.visual_projection(ours.model.vision_model(pixel_values=x).pooler_output)
        assert_close(mine, theirs.encode_image(x), atol=1e-5, rtol=1e-5)
        assert_close(ours.text_features(PROMPTS), theirs.encode_text(tokenize(PROMPTS), normalize=True), atol=1e-5, rtol=1e-5)


def test_the_same_score(ours, theirs, place, monkeypatch, measured):
    "The package's own `score`, from the file, from picture and prompt to number, one by one; ours in a batch where shapes allow it."
    prepare = image_transform(28, is_train=False, resize_longest_max=True)
    monkeypatch.setattr(hpsv2, 'model_dict', dict(model=theirs, preprocess_val=prepare))
    file, largest = str(place/'HPS_v2.1_compressed.pt'), 0.
    for picture in pictures():
        expected = torch.tensor(np.array([hpsv2.score(picture, prompt, cp=file)[0] for prompt in PROMPTS]))
        mine = ours(tensor(picture).expand(len(PROMPTS), -1, -1, -1), PROMPTS)
        largest = max(largest, float((mine - expected).abs().max()))
        assert_close(mine, expected, atol=1e-5, rtol=0)
    assert len(set(expected.numpy().round(4))) == len(expected), 'scores must differ for the comparison to mean something'
    measured("largest difference from hpsv2's own code", scores=largest)
