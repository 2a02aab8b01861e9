"The reward server over loopback: what goes out and comes back, and every way it can fail, from busy to gone in the middle of a training."
import base64
import io
import json
import os
import re
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
import zlib
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch
from PIL import Image
from torch.testing import assert_close

from egrpo.cli.commands import main
from egrpo.rewards import server as reward_server
from egrpo.rewards.reward import RewardError, get_reward
from egrpo.rewards.server import RewardClient, bare_png, from_png, make_server, pack, public_address, to_png, unpack
from egrpo.train.checkpoint import check_same_run
from egrpo.train.config import TrainConfig
from egrpo.train.prepare import describe_run

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
    monkeypatch.setattr('egrpo.rewards.server.time.sleep', lambda s: waits.append(s) or real(0))
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
    body = json.dumps(dict(prompts=['p'], images=[base64.b64encode(to_png(IMAGES[0])).decode()])).encode()
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
    (200, b'{"scores": [true, 2, 3, 4, 5]}', 'finite'), (200, b'{"scores": [1e39, 2, 3, 4, 5]}', 'finite'),
    (200, b'{"scores": [' + b'9' * 5000 + b', 2, 3, 4, 5]}', 'finite'), (200, b'[' * 50_000, 'did not answer in JSON'),
    (200, b' ' * 70_000, 'more than 65536 bytes'), (302, b'', 'redirects are not followed'),
    (400, json.dumps(dict(error='\x1b[2J' + 'a' * 5000)).encode(), r'refused: \\x1b\[2Ja{190,}…$'),
    (200, b'["' + b'a' * 5000 + b'"]', r'got .{200}$'),
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


@pytest.mark.parametrize('url', [None, '', '127.0.0.1:8000', 'ftp://a', 'http://', 'http://a:x', 'http://a:99999', 'http://a b', 'http://ü'])
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
    from egrpo.train.checkpoint import load_checkpoint
    from egrpo.train.trainer import TrainConfig, Trainer
    monkeypatch.setattr('egrpo.rewards.server.time.sleep', lambda s: None)
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
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 0 and process.stderr.read() == ''
    finally: process.kill()


def test_what_the_command_serves_is_named_with_its_code(tmp_path, monkeypatch):
    "So that a training does not go on with a reward that has changed behind its name."
    seen, file = [], tmp_path/'mine.py'
    class Told(Exception): pass
    def told(reward, host, port, name, token):
        seen.append(name)
        raise Told
    monkeypatch.setattr(reward_server, 'make_server', told)
    for code in ('images.mean((1, 2, 3))', '-images.mean((1, 2, 3))'):
        file.write_text(f'def score(images, prompts): return {code}\n')
        with pytest.raises(Told): main(['serve', '--reward', f'verifier + {file}:score'])
    with pytest.raises(Told): main(['serve', '--reward', 'verifier'])
    assert len(set(seen)) == 3 and seen[2] == 'verifier' and all(f'{file}:score (code ' in name for name in seen[:2])


# What a broken or hostile client may do

def png(*more, size=(8, 8), form='PNG', mode='RGB'):
    "A picture, with more chunks after its header."
    out = io.BytesIO()
    Image.new(mode, size).save(out, form)
    return out.getvalue()[:33] + b''.join(more) + out.getvalue()[33:]


def chunk(kind, data):
    "A chunk of a PNG."
    return struct.pack('>I', len(data)) + kind + data + struct.pack('>I', zlib.crc32(kind + data))


def request_of(*pictures):
    "The body of a request."
    return json.dumps(dict(prompts=['a'] * len(pictures), images=[base64.b64encode(o).decode() for o in pictures])).encode()


def head(*headers, host='localhost'):
    "The head of a POST."
    return '\r\n'.join(['POST / HTTP/1.1', f'Host: {host}', *headers, '', '']).encode()


def connect(url):
    "A connection that is given some seconds for everything."
    return socket.create_connection(('127.0.0.1', int(url.rpartition(':')[2])), timeout=20)


def answer(connection):
    "Status, headers and JSON that a server answers with."
    first, _, body = connection.makefile('rb').read().partition(b'\r\n\r\n')
    return int(first.split()[1]), first.decode(), json.loads(body)


def until(condition):
    "Wait for what another thread does, for some seconds."
    end = time.monotonic() + 20
    while not condition() and time.monotonic() < end: time.sleep(.01)


def post(url, *headers, body=b'', host='localhost'):
    "Status and JSON of the answer to a POST."
    with connect(url) as s:
        s.sendall(head(*headers, host=host) + body)
        status, _, content = answer(s)
    return status, content


def score(url, body):
    "Status and JSON of the answer to a body."
    return post(url, f'Content-Length: {len(body)}', body=body)


@pytest.mark.parametrize('pictures, message', [
    ([png(size=(4000, 4000), mode='1')], '4000 × 4000 pixels: send at most 4194304'),
    ([png(size=(2048, 2048), mode='1')] * 5, 'they have 20971520 pixels: send at most 16777216'),
    ([png(size=(1, 17))], '1 × 17 pixels, beyond 16:1'), ([png()] * 33, '33 images: send 1 to 32'), ([png(), png(size=(8, 9))], '2 sizes'),
    ([png(form='JPEG')], 'no PNG'), ([png(form='TIFF')], 'no PNG'), ([png(form='EPS')], 'no PNG'), ([b''], 'no PNG'),
    ([png()[:-5]], 'cut off'), ([png(chunk(b'tEXt', b'') * 10_000)], 'more than 8192 chunks'),
], ids=lambda o: o if isinstance(o, str) else '')
def test_pictures_that_are_refused(pictures, message, monkeypatch):
    "Before anything is decoded."
    monkeypatch.setattr(reward_server, '_pixels', None)
    with pytest.raises(ValueError, match=message): unpack(request_of(*pictures))


def test_only_what_makes_the_pixels_is_read():
    "A second header, a text that unpacks to much, and a profile."
    plain, bomb = png(), b'a\0\0' + zlib.compress(bytes(2**21)) # Pillow stops at 1 MB
    header = chunk(b'IHDR', struct.pack('>IIBBBBB', 9000, 9000, 8, 2, 0, 0, 0))
    for o in (header, chunk(b'zTXt', bomb), chunk(b'iCCP', bomb)):
        assert bare_png(png(o)) == bare_png(plain)
        assert_close(from_png(png(o)), from_png(plain))


@pytest.mark.parametrize('body, message', [
    (b'[' * 100_000, 'recursion'), (b'9' * 5000, 'digits|two lists'), (b'[' + b'[],' * 300_000, 'more than 400000 values'),
    (b'[]', 'two lists'), (b'{"prompts": "a", "images": "b"}', 'two lists'), (b'\xff', 'utf-8'),
    (b'{"prompts": [], "images": [3]}', 'images'),
    (json.dumps(dict(prompts=['a' * 10_001], images=[base64.b64encode(png()).decode()])).encode(), '10001 characters'),
], ids=lambda o: o if isinstance(o, str) else '')
def test_json_that_is_refused(body, message):
    "With one short line and 400."
    with serving(brightness) as url: status, content = score(url, body)
    assert status == 400 and len(content['error']) < 400 and content['error'].isprintable()
    assert re.search(message, content['error'])


@pytest.mark.parametrize('headers, status, message', [
    ([], 411, 'Content-Length'), (['Content-Length: -1'], 400, "got '-1'"), (['Content-Length: 1e3'], 400, 'number of bytes'),
    (['Content-Length: ²'], 400, 'number of bytes'), (['Content-Length: ' + '9' * 30], 400, 'number of bytes'),
    (['Content-Length: \x1b[2J' + 'x' * 999], 400, '\\x1b'), (['Content-Length: 3', 'Content-Length: 3'], 400, 'number of bytes'),
    (['Content-Length: 3', 'Transfer-Encoding: chunked'], 411, 'Transfer-Encoding'), ([f'Content-Length: {2**30}'], 413, 'more than'),
    (['A: ' + 'a' * 20_000], 431, 'head'),
], ids=lambda o: '')
def test_lengths_that_are_none(headers, status, message):
    with serving(brightness) as url: got, content = post(url, *headers)
    assert got == status and message in content['error'] and len(content['error']) < 300


def test_bodies_are_bounded_in_sum(monkeypatch):
    "Who has been silent longest makes room for who sends, and is told to ask again; nobody is refused for good."
    monkeypatch.setattr(reward_server, 'MAX_HELD', 300_000)
    server = make_server(brightness, port=0)
    def arrived(n): return sum(v.held for v in [*server.visits.values()]) > 120_000 * n
    with running(server) as url:
        halves = [connect(url) for _ in range(3)]
        for n, s in enumerate(halves, 1):
            s.sendall(head('Content-Length: 200000') + bytes(120_000))
            until(lambda n=n: n == 3 or arrived(n)) # the third finds no room
        status, headers, content = answer(halves[0])
        assert status == 503 and 'Retry-After: 1' in headers and 'full' in content['error']
        assert_close(RewardClient(url, retries=0)(IMAGES, PROMPTS), brightness(IMAGES, PROMPTS))
        for s in halves: s.close()


def test_connections_are_bounded(monkeypatch):
    monkeypatch.setattr(reward_server, 'MAX_CONNECTIONS', 4)
    with serving(brightness) as url:
        halves = [connect(url) for _ in range(12)]
        for s in halves: s.sendall(head('Content-Length: 100')[:-2])
        assert_close(RewardClient(url, retries=0)(IMAGES, PROMPTS), brightness(IMAGES, PROMPTS))
        assert answer(halves[0])[0] == 503
        for s in halves: s.close()


@pytest.mark.parametrize('sent', [b'', head('Content-Length: 9')[:-2], head('Content-Length: 9')], ids=['nothing', 'half a head', 'head'])
def test_silence_ends(sent, monkeypatch):
    monkeypatch.setattr(reward_server, 'GRACE', .3)
    monkeypatch.setattr(reward_server, 'PACE', 1) # what has come would allow for more
    with serving(brightness) as url, connect(url) as s:
        s.sendall(sent)
        assert answer(s)[0] == 408


def test_drips_end(monkeypatch):
    "Never silent, but too slow."
    monkeypatch.setattr(reward_server, 'GRACE', .5)
    monkeypatch.setattr(reward_server, 'LINGER', .2)
    began = time.monotonic()
    with serving(brightness) as url, connect(url) as s:
        s.sendall(head('Content-Length: 1000'))
        with pytest.raises(OSError):
            while time.monotonic() < began + 10:
                s.sendall(b' ')
                time.sleep(.1)
    assert time.monotonic() < began + 9


def test_many_may_come_at_once():
    "They wait to be accepted; the system's own queue was of five."
    with make_server(brightness, port=0) as server:
        waiting = [socket.create_connection(server.server_address, timeout=1) for _ in range(100)]
        for s in waiting: s.close()


@pytest.mark.parametrize('host, headers, status', [
    ('localhost:1', [], 411), ('127.0.0.1', ['Origin: http://localhost:3000'], 411), ('[::1]:80', [], 411),
    ('evil.example', [], 403), ('localhost.evil.example', [], 403), ('', [], 403), ('[', [], 403),
    ('localhost', ['Origin: http://evil.example'], 403), ('localhost', ['Origin: null'], 403), ('localhost', ['Host: evil.example'], 403),
])
def test_names_of_this_machine(host, headers, status):
    "A page of a browser may not ask, whatever name it lets point here."
    with serving(brightness) as url: assert post(url, *headers, host=host)[0] == status


def test_token(monkeypatch):
    with running(make_server(brightness, port=0, token='secret')) as url:
        for headers in ([], ['Authorization: Bearer secre'], ['Authorization: Basic secret'], ['Authorization: Bearer']):
            assert post(url, *headers)[0] == 401
        with pytest.raises(RewardError, match='token is missing or wrong: set EGRPO_TOKEN') as e: RewardClient(url)(IMAGES, PROMPTS)
        assert 'secret' not in str(e.value) and RewardClient(url).served_reward() is None
        assert_close(RewardClient(url, token='secret')(IMAGES, PROMPTS), brightness(IMAGES, PROMPTS))
        monkeypatch.setenv('EGRPO_TOKEN', 'secret')
        assert_close(get_reward(f'server({url})')(IMAGES, PROMPTS)['server'], brightness(IMAGES, PROMPTS))
    with make_server(brightness, port=0) as server: assert server.token == 'secret'
    with pytest.raises(ValueError, match='visible ASCII'): RewardClient(url, token='se\ncret')


def test_other_machines_need_the_token():
    with pytest.raises(ValueError, match='give --token or set EGRPO_TOKEN'): make_server(brightness, '0.0.0.0', 0)
    with pytest.raises(ValueError, match='host must be an address'): make_server(brightness, '', 0)
    with running(make_server(brightness, '0.0.0.0', 0, token='secret')) as url: # by any name
        assert post(url, 'Authorization: Bearer secret', host='gpu.example')[0] == 411


@pytest.mark.parametrize('score', [True, 1j, float('nan'), 1e39])
def test_what_is_no_score_is_not_served(score):
    with serving(lambda images, prompts: [score] * 5) as url, pytest.raises(RewardError, match='refused: the reward gave'):
        RewardClient(url)(IMAGES, PROMPTS)


# What a broken or hostile server may do

def read_whole(connection):
    "Read a request to its end: a connection that is closed with unread bytes is reset, and the answer may be lost."
    with connection.makefile('rb') as file:
        size = 0
        while line := file.readline().strip():
            if line.lower().startswith(b'content-length:'): size = int(line.split(b':')[1])
        file.read(size)


@contextmanager
def hostile(work):
    "A server that does this with each connection."
    def serve():
        while True:
            try: connection = listening.accept()[0]
            except OSError: return
            with connection:
                try:
                    read_whole(connection)
                    work(connection)
                except OSError: pass
    with socket.create_server(('127.0.0.1', 0)) as listening:
        threading.Thread(target=serve, daemon=True).start()
        yield f'http://127.0.0.1:{listening.getsockname()[1]}'


@pytest.mark.parametrize('start', [b'HTTP/1.0 200 OK\r\n\r\n', b'HTTP/1.0 200 OK\r\nA: ', b''], ids=['body', 'head', 'first line'])
def test_a_dripping_answer_ends_in_time(start):
    def drip(connection):
        connection.sendall(start)
        for _ in range(400):
            connection.sendall(b' ')
            time.sleep(.05)
    began = time.monotonic()
    with hostile(drip) as url, pytest.raises(RewardError, match='has not answered within 0.5 s'):
        RewardClient(url, .5, 0)(IMAGES, PROMPTS)
    assert time.monotonic() - began < 10


def test_an_endless_answer_is_not_read():
    sent = []
    def flood(connection):
        connection.sendall(b'HTTP/1.0 200 OK\r\n\r\n')
        for _ in range(200):
            connection.sendall(bytes(2**20))
            sent.append(1)
    with hostile(flood) as url, pytest.raises(RewardError, match='more than 65536 bytes'): RewardClient(url, 20, 0)(IMAGES, PROMPTS)
    assert len(sent) < 50


def test_no_redirect_is_followed():
    seen = []
    with serving(lambda images, prompts: seen.append(1) or [1.] * 5) as target:
        def redirect(connection): connection.sendall(f'HTTP/1.0 307 Moved\r\nLocation: {target}\r\n\r\n'.encode())
        with hostile(redirect) as url, pytest.raises(RewardError, match='redirects are not followed'): RewardClient(url)(IMAGES, PROMPTS)
        assert RewardClient(url, retries=0).served_reward() is None
    assert seen == []


def test_full_is_asked_again_for_as_long_as_an_answer_may_take(no_waiting):
    "A queue is no failure, however often one is told to come back."
    good = json.dumps(dict(scores=[1.] * 5)).encode()
    answers = [b'HTTP/1.0 503 Full\r\nRetry-After: 2\r\n\r\n'] * 7
    answers.append(b'HTTP/1.0 503 Full\r\nRetry-After: 0\r\n\r\n')
    answers += [b'HTTP/1.0 503 Full\r\nRetry-After: 9999\r\n\r\n', b'HTTP/1.0 200 OK\r\n\r\n' + good]
    def full(connection): connection.sendall(answers.pop(0))
    with hostile(full) as url: assert RewardClient(url, retries=0)(IMAGES, PROMPTS).tolist() == [1.] * 5
    assert no_waiting == [2] * 7 + [1, 10]


def test_secrets_of_an_address_are_not_shown(no_waiting):
    with pytest.raises(ValueError, match='needs an address') as a: RewardClient('me:secret@host:80')
    with pytest.raises(ValueError, match='no user:password@') as b: RewardClient('http://me:secret@host')
    with pytest.raises(ValueError, match='after the comma') as c: get_reward('server(http://a/?key=x,secret)')
    with pytest.raises(ValueError, match='not a weighted sum') as d: get_reward('2 server(http://a/?key=secret)')
    with serving(brightness) as url: pass
    two = get_reward(f'server({url}/?key=secret) + server(http://b/?key=secret)')
    with pytest.raises(RewardError, match='is not there') as e: two(IMAGES, PROMPTS)
    planned = describe_run(TrainConfig(reward='server(http://b/?key=secret)'))
    saved = dict(reward='server(http://a/?key=secret)')
    with pytest.raises(ValueError, match='reward was') as f: check_same_run(saved, dict(reward='clip'))
    assert 'secret' not in f"{a.value}{b.value}{c.value}{d.value}{e.value}{f.value}{two}{two.names}{planned}"
    assert public_address('.5*server(http://me:secret@a/b?key=secret, 3) + clip') == '.5*server(http://...@a/b?..., 3) + clip'


def test_the_served_reward_has_a_name():
    with running(make_server(brightness, port=0, name='brightness + .5*\x1b')) as url:
        client = RewardClient(url)
        assert client.served_reward() == 'brightness + .5*\\x1b'
    assert client.served_reward() is None # away
    for said in (b'', b'[]', b'{"reward": 3}', b'[' * 50_000):
        def other(connection, said=said): connection.sendall(b'HTTP/1.0 200 OK\r\n\r\n' + said)
        with hostile(other) as url: assert RewardClient(url).served_reward() is None


def train_words(reward, more='--dry-run'): return ['train', '--scale', 'smoke', *more.split(), '--reward', reward]


@pytest.mark.parametrize('more', ['--dry-run', '--out run'])
def test_servers_are_asked_before_a_model_is_loaded(monkeypatch, tmp_path, capsys, no_waiting, more):
    "In a run as in a dry run: what is served, or the client's own error."
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr('egrpo.models.policy.load_pipeline', lambda *args: pytest.fail('the model was loaded'))
    for (status, body), says in {(404, b'?'): 'HTTP 404', (401, b'{"error": "who?"}'): 'refused: who?', (500, b''): 'HTTP 500',
                                 (200, b'<html>'): 'did not answer in JSON', (200, b'{"scores": [0.5]}'): 'with 2 finite numbers',
                                 (200, b'{"scores": [NaN, 1]}'): 'with 2 finite numbers'}.items():
        with answering((status, body)) as url: assert main(train_words(f'preference + server({url})', more)) == 2
        out, err = capsys.readouterr()
        assert not out and err.count('\n') == 1 and says in err, err
    for words in (train_words(f'server({url})', more), train_words(f'judge({url}/v1, some-model)', more),
                  train_words('preference', more) + ['--eval-rewards', f'server({url})'], ['evaluate', '--rewards', f'server({url})']):
        assert main(words) == 2
        assert 'is not there' in capsys.readouterr().err
    assert not [*tmp_path.iterdir()]


def test_a_dry_run_says_what_servers_serve(monkeypatch, tmp_path, capsys):
    "One that answers no GET, which the protocol leaves to it, is as good."
    monkeypatch.chdir(tmp_path)
    with running(make_server(brightness, port=0, name='brightness')) as url:
        assert main(train_words(f'preference + server({url})')) == 0
        assert f'reward  server({url}) serves brightness\n' in capsys.readouterr().out
    with answering((200, b'{"scores": [1, 2]}')) as url:
        assert main(train_words(f'server({url})')) == 0
        assert f'reward  server({url}) answers\n' in capsys.readouterr().out
    answer = dict(choices=[dict(logprobs=dict(content=[dict(top_logprobs=[dict(token='Yes', logprob=-.1)])]))])
    with answering((200, json.dumps(answer).encode())) as url:
        assert main(train_words(f'judge({url}/v1, some-model)')) == 0
        assert f'reward  judge({url}/v1, some-model) answers\n' in capsys.readouterr().out
