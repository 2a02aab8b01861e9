"The reward server over loopback: what goes out and comes back, and every way it can fail, from busy to gone in the middle of a training."
import json
import os
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch
from torch.testing import assert_close

from egrpo import reward_server
from egrpo.reward import RewardError, get_reward
from egrpo.reward_server import RewardClient, from_png, make_server, pack, to_png, unpack

IMAGES = (torch.rand(5, 3, 12, 20, generator=torch.Generator().manual_seed(0)) * 255).round() / 255
PROMPTS = ['a', 'b', 'a “c”', '', 'ü\n']


def brightness(images, prompts): return images.mean((1, 2, 3)) + torch.tensor([float(len(o)) for o in prompts])


@pytest.fixture(autouse=True)
def no_token(monkeypatch):
    "Whoever runs the tests may have one."
    monkeypatch.delenv('EGRPO_TOKEN', raising=False)


@contextmanager
def running(server):
    "A server in a thread; inside, its address."
    thread = threading.Thread(target=server.serve_forever, kwargs=dict(poll_interval=.05))
    thread.start()
    try: yield f'http://127.0.0.1:{server.server_port}'
    finally: server.shutdown(), server.server_close(), thread.join()


def serving(reward): return running(make_server(reward, port=0))


def answering(*answers):
    "A server that gives these (status, body) in turn, the last one for good."
    given = list(answers)
    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *args): pass
        def do_POST(self):
            self.rfile.read(int(self.headers['Content-Length']))
            status, body = given.pop(0) if len(given) > 1 else given[0]
            self.send_response(status)
            self.end_headers()
            self.wfile.write(body)
    return running(ThreadingHTTPServer(('127.0.0.1', 0), Handler))


@pytest.fixture
def no_waiting(monkeypatch):
    "The waits between attempts, kept instead of waited."
    waits, real = [], time.sleep
    monkeypatch.setattr('egrpo.reward_server.time.sleep', lambda s: waits.append(s) or real(0))
    return waits


def test_there_and_back():
    with serving(brightness) as url:
        assert_close(RewardClient(url)(IMAGES, PROMPTS), brightness(IMAGES, PROMPTS))
        rewards = get_reward(f'.5*server({url}) + 2*verifier')
        assert_close(rewards(IMAGES, ['a red circle'] * 5)['server'], brightness(IMAGES, ['a red circle'] * 5))
        assert rewards.weights == dict(server=.5, verifier=2.)


@pytest.mark.parametrize('n', [1, 31, 32, 33, 65])
def test_any_number_of_images(n):
    sizes = []
    def counted(images, prompts):
        sizes.append(len(images))
        return images.mean((1, 2, 3))
    x = torch.rand(n, 3, 4, 4, generator=torch.Generator().manual_seed(n))
    with serving(counted) as url: assert_close(RewardClient(url)(x, ['p'] * n), x.mean((1, 2, 3)), atol=1/509, rtol=0)
    assert sum(sizes) == n and max(sizes) <= 32


def test_pngs_are_rounded_and_clipped():
    x = torch.tensor([-1., 0., .5/255, .6/255, .5, 1., 3.]).expand(3, 1, -1)
    assert_close(from_png(to_png(x))[0, 0] * 255, torch.tensor([0., 0., 0., 1., 128., 255., 255.]))
    assert_close(unpack(pack(IMAGES, PROMPTS))[0], IMAGES, atol=0, rtol=0)


def test_two_trainings_at_once_do_not_meet():
    inside = []
    def alone(images, prompts):
        inside.append(1)
        assert len(inside) == 1
        time.sleep(.02)
        inside.pop()
        return images.mean((1, 2, 3))
    with serving(alone) as url:
        out, threads = {}, []
        for i in range(4):
            def ask(i=i): out[i] = RewardClient(url)(IMAGES[i:i + 1], ['p'])
            threads.append(threading.Thread(target=ask))
        for t in threads: t.start()
        for t in threads: t.join()
    for i in range(4): assert_close(out[i], IMAGES[i:i + 1].mean((1, 2, 3)))


def test_what_the_reference_client_of_another_language_sees():
    "The protocol as documented, without our client."
    body = json.dumps(dict(prompts=['p'], images=[__import__('base64').b64encode(to_png(IMAGES[0])).decode()])).encode()
    with serving(brightness) as url:
        answer = urllib.request.urlopen(urllib.request.Request(url, body))
        assert answer.headers['Content-Type'] == 'application/json'
        assert json.loads(answer.read())['scores'] == pytest.approx([float(IMAGES[0].mean()) + 1])
        assert 'ask' in json.loads(urllib.request.urlopen(url).read())
        with pytest.raises(urllib.error.HTTPError) as e: urllib.request.urlopen(urllib.request.Request(url, b'no json'))
        assert e.value.code == 400 and 'must be JSON' in json.loads(e.value.read())['error']


@pytest.mark.parametrize('status', [502, 503, 504])
def test_busy_is_asked_again(no_waiting, status):
    good = json.dumps(dict(scores=[1.] * 5)).encode()
    with answering((status, b''), (status, b'<html>'), (200, good)) as url: assert RewardClient(url)(IMAGES, PROMPTS).tolist() == [1.] * 5
    assert no_waiting == [1, 2]
    with answering((status, b'')) as url, pytest.raises(RewardError, match=f'is busy .HTTP {status}., asked 4 times'):
        RewardClient(url)(IMAGES, PROMPTS)
    assert no_waiting == [1, 2, 1, 2, 4]


@pytest.mark.parametrize('status, body, message', [
    (400, b'{"error": "too dark"}', 'refused: too dark'), (500, b'oops', 'refused: HTTP 500'), (404, b'', 'refused: HTTP 404'),
    (200, b'<html>', 'did not answer in JSON'), (200, b'{}', 'must answer'), (200, b'[1, 2, 3, 4, 5]', 'must answer'),
    (200, b'{"scores": [1, 2]}', 'with 5 finite numbers'), (200, b'{"scores": [1, 2, 3, 4, NaN]}', 'finite'),
    (200, b'{"scores": ["1", 2, 3, 4, 5]}', 'finite'), (200, b'{"scores": null}', 'must answer'),
])
def test_what_will_not_pass_is_not_asked_again(no_waiting, status, body, message):
    with answering((status, body)) as url, pytest.raises(RewardError, match=message) as e: RewardClient(url)(IMAGES, PROMPTS)
    assert no_waiting == [] and '\n' not in str(e.value) and f'server({url})' in str(e.value)


def test_what_the_served_reward_said_arrives(no_waiting):
    "A server without memory is not asked again, and its remedy is read where the training runs."
    def full(images, prompts): raise torch.OutOfMemoryError('CUDA out of memory')
    with serving(get_reward(full).total) as url, pytest.raises(RewardError, match="refused: reward 'full' ran out of memory on 5") as e:
        get_reward(f'server({url})')(IMAGES, PROMPTS)
    assert no_waiting == [] and '\n' not in str(e.value)


def test_nobody_there(no_waiting):
    with serving(brightness) as url: pass
    with pytest.raises(RewardError, match='is not there .*asked 4 times: start it .egrpo serve.') as e:
        get_reward(f'server({url})')(IMAGES, PROMPTS)
    assert no_waiting == [1, 2, 4] and '\n' not in str(e.value)


def test_slow(no_waiting):
    def slow(images, prompts):
        threading.Event().wait(.5)
        return [0.] * len(prompts)
    with serving(slow) as url, pytest.raises(RewardError, match='has not answered within 0.1 s, asked 2 times'):
        RewardClient(url, timeout=.1, retries=1)(IMAGES, PROMPTS)


def test_who_has_left_is_not_scored(no_waiting):
    "A client that gave up asks again; its first request, still in the queue, must not cost the server twice."
    scored, going = [], threading.Event()
    def slow(images, prompts):
        scored.append(prompts)
        going.set()
        threading.Event().wait(.8)
        return [0.] * len(prompts)
    with serving(slow) as url:
        first = threading.Thread(target=RewardClient(url), args=(IMAGES, PROMPTS))
        first.start()
        assert going.wait(10)
        with pytest.raises(RewardError, match='has not answered'): RewardClient(url, timeout=.1, retries=1)(IMAGES, PROMPTS)
        first.join()
        RewardClient(url)(IMAGES, PROMPTS)
    assert len(scored) == 2


@pytest.mark.parametrize('answer', [[1.] * 5, [1.], None], ids=['scores', 'wrong scores', 'error'])
def test_a_connection_that_is_reset_makes_no_noise(answer, monkeypatch):
    "The client goes while it is served, whatever the answer would have been."
    going, gone = threading.Event(), threading.Event()
    def slow(images, prompts):
        going.set()
        assert gone.wait(10)
        threading.Event().wait(.1)
        return answer or 1 / 0
    server, noise = make_server(slow, port=0), []
    server.daemon_threads = False # closing it waits for them
    monkeypatch.setattr(server, 'handle_error', lambda *args: noise.append(sys.exc_info()[1]))
    with running(server), socket.create_connection(server.server_address) as client:
        body = pack(IMAGES, PROMPTS)
        client.sendall(f'POST / HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n\r\n'.encode() + body)
        assert going.wait(10)
        client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack('ii', 1, 0)) # reset, not closed in order
        client.close()
        gone.set()
    assert noise == []


def test_seconds_to_wait():
    assert get_reward('server(http://a, 600)').rewards['server'].timeout == 600
    assert str(get_reward('2*server(http://a, 600)')) == '2*server(http://a, 600)'
    with pytest.raises(ValueError, match='after the comma stand seconds'): get_reward('server(http://a, soon)')


@pytest.mark.parametrize('url', [None, '', '127.0.0.1:8000', 'ftp://a', 'http://'])
def test_bad_addresses(url):
    with pytest.raises(ValueError, match=r'write server\(http://127.0.0.1:8000\)'): RewardClient(url)


@pytest.mark.parametrize('port', [-1, 70000])
def test_bad_ports(port):
    with pytest.raises(ValueError, match='port must be'): make_server(brightness, port=port)


def test_a_port_that_is_taken():
    with make_server(brightness, port=0) as server, pytest.raises(ValueError, match='choose another --port'):
        make_server(brightness, port=server.server_port)


def test_a_server_that_goes_away_in_training_loses_nothing(tmp_path, monkeypatch):
    "It stops with one line and a checkpoint; when the server is back, --resume ends where a run without the accident ends."
    from egrpo.checkpoint import load_checkpoint
    from egrpo.trainer import TrainConfig, Trainer
    monkeypatch.setattr('egrpo.reward_server.time.sleep', lambda s: None)
    small = dict(num_steps=6, active_steps=2, num_generations=3, prompts_per_iteration=2, iterations=4, eval_size=2, eval_every=0,
                 eval_rewards='verifier', device='cpu', lora_rank=2, lr=1e-3)
    calls = []
    def mortal(images, prompts):
        calls.append(1)
        return brightness(images, prompts)
    answer = reward_server._answer # hangs up on the third iteration
    monkeypatch.setattr(reward_server, '_answer', lambda *args, **said: len(calls) < 3 and answer(*args, **said))
    server = make_server(mortal, port=0)
    port, reward = server.server_port, f'server(http://127.0.0.1:{server.server_port})'
    with running(server):
        original = RewardClient._ask
        monkeypatch.setattr(RewardClient, '_ask', lambda self, body: original(self, body) if len(calls) < 3 else
                            (_ for _ in ()).throw(ConnectionRefusedError('refused')))
        with pytest.raises(RewardError, match='asked 4 times'): Trainer(TrainConfig(out=str(tmp_path/'run'), reward=reward, **small)).fit()
    assert load_checkpoint(tmp_path/'run/checkpoint')[1]['iteration'] == 2
    monkeypatch.setattr(RewardClient, '_ask', original)
    monkeypatch.setattr(reward_server, '_answer', answer)
    with running(make_server(brightness, port=port)):
        Trainer(TrainConfig(out=str(tmp_path/'run'), reward=reward, resume=True, **small)).fit()
        Trainer(TrainConfig(out=str(tmp_path/'straight'), reward=reward, **small)).fit()
    (a, _), (b, _) = (load_checkpoint(tmp_path/o/'checkpoint') for o in ('run', 'straight'))
    for k, v in a['weights'].items(): assert_close(v, b['weights'][k], atol=0, rtol=0)


def test_the_command_serves_and_stops():
    env = {**os.environ, 'OMP_NUM_THREADS': '1'}
    command = [sys.executable, '-m', 'egrpo', 'serve', '--reward', 'verifier + .5*verifier_strict', '--port', '0']
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env)
    try:
        line = process.stdout.readline()
        spec = line[line.index("'") + 1:line.rindex("'")]
        there = get_reward(spec)(IMAGES, ['a red circle'] * 5)['server']
        assert_close(there, get_reward('verifier + .5*verifier_strict').total(IMAGES, ['a red circle'] * 5))
        process.send_signal(signal.SIGINT)
        assert process.wait(30) == 0 and process.stderr.read() == ''
    finally: process.kill()
