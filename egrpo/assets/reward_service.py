"""A reward of another Python environment as a server for trainings. This file needs Pillow, and nothing of egrpo: copy it where you like.

    python reward_service.py hpsv2                # the package hpsv2 or hpsv2x; --weights FILE instead of the hub's
    python reward_service.py hpsv3                # the package hpsv3, on a GPU
    python reward_service.py my_module:my_reward  # a function (list of PIL images, list of prompts) -> scores

Trainings name it: --reward 'server(http://127.0.0.1:8765)'. It answers this machine alone.
"""
import argparse
import base64
import importlib
import io
import json
import math
import os
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from PIL import Image

MOST_IMAGES = 32 # of a request
MOST_BYTES = 2**27


def torchvision():
    "Import torchvision; one that was built for another torch lacks compiled operators that no reward here uses, so they get names."
    try: return importlib.import_module('torchvision'), None
    except RuntimeError:
        import torch
        for name in [o for o in sys.modules if o.startswith('torchvision')]: del sys.modules[name]
        library = torch.library.Library('torchvision', 'DEF') # its names last as long as it does
        for name in ('nms', 'qnms'): library.define(name + '(Tensor dets, Tensor scores, float iou_threshold) -> Tensor')
        return importlib.import_module('torchvision'), library


def hpsv2(weights, version='v2.1'):
    "HPS by the package's own model, preparation and tokenizer. Its `score` reads the weights at every call, and first those of a CLIP."
    import torch
    _, hpsv2.library = torchvision()
    from hpsv2.src.open_clip import create_model_and_transforms, get_tokenizer
    from hpsv2.utils import hps_version_map
    if weights is None:
        from huggingface_hub import hf_hub_download
        weights = hf_hub_download('xswu/HPSv2', hps_version_map[version])
    device = 'cuda' if torch.cuda.is_available() else 'cpu'
    settings = dict(precision='amp', device=device, light_augmentation=True, output_dict=True) # as `score` has them
    model, _, prepare = create_model_and_transforms('ViT-H-14', **settings)
    model.load_state_dict(torch.load(weights, map_location=device, weights_only=True)['state_dict'])
    model.eval()
    tokenize = get_tokenizer('ViT-H-14')

    def score(images, prompts):
        "Cosine of picture and prompt, as the package's `score`."
        pixels = torch.stack([prepare(image) for image in images]).to(device)
        with torch.no_grad(), torch.autocast('cuda', enabled=device == 'cuda'):
            found = model(pixels, tokenize(prompts).to(device))
        return (found['image_features'] * found['text_features']).sum(1).float().tolist()
    return score


def hpsv3(weights):
    "HPSv3 by its own inferencer: the mean of the two numbers that it predicts."
    import torch
    from hpsv3 import HPSv3RewardInferencer
    judge = HPSv3RewardInferencer(checkpoint_path=weights, device='cuda')

    def score(images, prompts):
        "One number per image."
        with torch.no_grad(): found = judge.reward(prompts=prompts, image_paths=images)
        return [float(o.reshape(-1)[0]) for o in found]
    return score


def find_reward(name, weights):
    "The reward of a name, or of module:function."
    if name in ('hpsv2', 'hpsv3'): return globals()[name](weights)
    module, colon, function = name.partition(':')
    if not colon: sys.exit('reward_service: reward must be hpsv2, hpsv3 or module:function, got ' + name)
    sys.path.insert(0, os.getcwd())
    return getattr(importlib.import_module(module), function)


class Handler(BaseHTTPRequestHandler):
    "Speaks the protocol of egrpo's reward server."
    timeout = 60 # seconds without a byte

    def log_message(self, *args): pass

    def answer(self, status, **fields):
        body = json.dumps(fields).encode()
        self.send_response(status)
        self.send_header('Content-Type', 'application/json')
        self.send_header('Content-Length', str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_GET(self): self.answer(200, reward=self.server.name)

    def do_POST(self):
        "Prompts and images in, scores out."
        try: images, prompts = self.read()
        except (ValueError, KeyError, TypeError, OSError) as e: return self.answer(400, error='the request cannot be read: ' + one_line(e))
        try:
            with self.server.turn: scores = [float(score) for score in self.server.reward(images, prompts)]
            if len(scores) != len(images) or not all(map(math.isfinite, scores)):
                raise ValueError('it gave %d numbers for %d images, or one that is not finite' % (len(scores), len(images)))
        except Exception as e: return self.answer(500, error=self.server.name + ' failed: ' + one_line(e)) # whatever a reward raises
        self.answer(200, scores=scores)

    def read(self):
        "Images and prompts of a request."
        size = int(self.headers.get('Content-Length') or 0)
        if not 0 < size <= MOST_BYTES: raise ValueError('it has %d bytes' % size)
        asked = json.loads(self.rfile.read(size))
        prompts, files = asked['prompts'], asked['images']
        if not 0 < len(files) == len(prompts) <= MOST_IMAGES: raise ValueError('send 1 to %d images, one prompt each' % MOST_IMAGES)
        return [Image.open(io.BytesIO(base64.b64decode(file)), formats=['PNG']).convert('RGB') for file in files], prompts


def one_line(error): return ' '.join((str(error) or type(error).__name__).split())[:300]


def main(words=None):
    "Load the reward, then serve it until Ctrl-C."
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('reward', help='hpsv2, hpsv3, or module:function')
    parser.add_argument('--port', type=int, default=8765, help='port of this machine (8765); 0 takes a free one')
    parser.add_argument('--weights', help="a file of the package's weights; without it they come from the hub")
    args = parser.parse_args(words)
    if args.weights and not os.path.isfile(args.weights): sys.exit('reward_service: --weights %s is no file' % args.weights)
    server = ThreadingHTTPServer(('127.0.0.1', args.port), Handler)
    server.daemon_threads = True
    server.name, server.turn = args.reward, threading.Lock()
    try: server.reward = find_reward(args.reward, args.weights)
    except (ImportError, OSError, AttributeError) as e: sys.exit('reward_service: %s cannot be loaded: %s' % (args.reward, one_line(e)))
    print("%s at http://127.0.0.1:%d, until Ctrl-C; train with --reward 'server(http://127.0.0.1:%d)'"
          % (args.reward, server.server_port, server.server_port), flush=True)
    try: server.serve_forever()
    except KeyboardInterrupt: pass


if __name__ == '__main__': main()
