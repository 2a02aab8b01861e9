"""The reward server under attack and under load, beside an honest client that asks throughout; and the client, asked by a hostile server.

All of it on 127.0.0.1. The server is `egrpo serve` with a reward that costs nothing. An attack is a process of its own, of a bounded
number of requests and at most `SECONDS` long. EGRPO_TRIAL_SECONDS=300 makes the load five minutes instead of one."""
import base64
import json
import os
import re
import resource
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
import zlib
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

SECONDS = 12 # that an attack lasts at most
WAIT = 20 # seconds that an honest client may have to wait, behind requests of the largest size
MEGABYTES = 900 # that a server may grow by: 320 MiB in flight, and one request of the largest size decoded
REWARD = '''
import os, time
def brightness(images, prompts):
    time.sleep(float(os.environ.get('TRIAL_SECONDS', 0)))
    return images.mean((1, 2, 3))
'''


# Attacks: functions of a port, run in a process without egrpo

def chunk(kind, data): return struct.pack('>I', len(data)) + kind + data + struct.pack('>I', zlib.crc32(kind + data))


def png(side, *more):
    "A black grey-scale PNG of `side`² pixels, with more chunks."
    header = chunk(b'IHDR', struct.pack('>IIBBBBB', side, side, 8, 0, 0, 0, 0))
    data = zlib.compress(bytes((side + 1) * side), 9)
    return b'\x89PNG\r\n\x1a\n' + header + b''.join(more) + chunk(b'IDAT', data) + chunk(b'IEND', b'')


def noise(side):
    "A PNG of noise, in colour: as many bytes as there can be."
    header = chunk(b'IHDR', struct.pack('>IIBBBBB', side, side, 8, 2, 0, 0, 0))
    row = bytes(1) + os.urandom(3 * side)
    return b'\x89PNG\r\n\x1a\n' + header + chunk(b'IDAT', zlib.compress(row * side, 0)) + chunk(b'IEND', b'')


def request_of(*pictures):
    "The body of a request."
    return json.dumps(dict(prompts=['a'] * len(pictures), images=[base64.b64encode(o).decode() for o in pictures])).encode()


def head(length, *more): return '\r\n'.join(['POST / HTTP/1.1', 'Host: localhost', f'Content-Length: {length}', *more, '', '']).encode()


def connect(port):
    "A connection that is given a few seconds for everything."
    return socket.create_connection(('127.0.0.1', port), timeout=SECONDS)


def send(port, *parts):
    "Send these, as far as the server wants them; the first line of what it answers."
    with connect(port) as s:
        with suppress(OSError):
            for part in parts: s.sendall(part)
        try: return s.recv(4096).split(b'\r\n')[0].decode()
        except OSError as e: return type(e).__name__


def all_at_once(n, work):
    "Run `work` in n threads, until `SECONDS` are over."
    threads = [threading.Thread(target=work, daemon=True) for _ in range(n)]
    end = time.monotonic() + SECONDS
    for t in threads: t.start()
    for t in threads: t.join(max(0, end - time.monotonic()))


def hold(sockets):
    "Keep connections open until the time is over."
    time.sleep(SECONDS - 2)
    for s in sockets: s.close()


def large_pictures(port):
    body = request_of(png(4000))
    for _ in range(20): print(send(port, head(len(body)), body))


def text_bombs(port):
    text = chunk(b'zTXt', b'a\0\0' + zlib.compress(bytes(2**20), 9))
    profile = chunk(b'iCCP', b'a\0\0' + zlib.compress(bytes(2**28), 9))
    body = request_of(*[png(8, *[text] * 60, profile)] * 32)
    for _ in range(20): print(send(port, head(len(body)), body))


def many_chunks(port):
    body = request_of(png(8, chunk(b'tEXt', b'') * 4_000_000))
    for _ in range(3): print(send(port, head(len(body)), body))


def negative_length(port):
    megabyte = bytes(2**20)
    print(send(port, head(-1), *[megabyte] * 1500))


def without_length(port):
    megabyte = b'100000\r\n' + bytes(2**20) + b'\r\n'
    print(send(port, b'POST / HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n', *[megabyte] * 1500))


def bodies(port, size, end=b''):
    part = b'[' * 2**20
    all_at_once(10, lambda: print(send(port, head(size), *[part] * (size // 2**20), end)))


def bodies_of_100_mb(port): bodies(port, 100 * 2**20)
def bodies_of_79_mb(port): bodies(port, 79 * 2**20)


def stalled_bodies(port):
    sockets = [connect(port) for _ in range(10)]
    part = bytes(2**20)
    for s in sockets:
        with suppress(OSError):
            s.sendall(head(79 * 2**20))
            for _ in range(78): s.sendall(part)
    hold(sockets)


def half_requests(port):
    sockets = []
    for _ in range(800):
        with suppress(OSError):
            sockets.append(connect(port))
            sockets[-1].sendall(head(1000)[:-2])
    hold(sockets)


def drips(port):
    sockets = [connect(port) for _ in range(200)]
    for s in sockets: s.sendall(head(10**6))
    end = time.monotonic() + SECONDS
    while time.monotonic() < end - .5:
        for s in sockets:
            with suppress(OSError): s.sendall(b' ')
        time.sleep(.3)


def large_heads(port):
    line = b'a: ' + b'b' * 60_000 + b'\r\n'
    all_at_once(50, lambda: [print(send(port, b'POST / HTTP/1.1\r\n', *[line] * 90)) for _ in range(6)])


def many_values(port):
    body = b'{"prompts": [], "images": [' + b'[],' * (26 * 2**20)
    for _ in range(4): print(send(port, head(len(body)), body))


def deep_json(port):
    body = b'[' * (70 * 2**20)
    for _ in range(4): print(send(port, head(len(body)), body))


def largest_requests(port):
    body = request_of(*[noise(2048)] * 4)
    all_at_once(6, lambda: print(send(port, head(len(body)), body)))


def other_names(port):
    megabyte = bytes(2**20)
    for name in ('evil.example', 'localhost.evil.example', '10.0.0.1'):
        begin = head(2**26).replace(b'localhost', name.encode())
        for _ in range(10): print(send(port, begin, *[megabyte] * 64))


ATTACKS = [large_pictures, text_bombs, many_chunks, negative_length, without_length, bodies_of_100_mb, bodies_of_79_mb, stalled_bodies,
           half_requests, drips, large_heads, many_values, deep_json, largest_requests, other_names]


# What is measured; an attack's process needs none of it

if __name__ != '__main__':
    import torch
    from row import Row

    from egrpo.rewards.reward import RewardError
    from egrpo.rewards.server import RewardClient


@dataclass
class Server:
    "A running `egrpo serve`."
    process:subprocess.Popen
    port:int

    def memory(self, what='VmRSS')->float:
        "Megabytes, now or at most (VmHWM)."
        return int(re.search(rf'{what}:\s+(\d+)', Path(f'/proc/{self.process.pid}/status').read_text())[1]) / 1024

    def forget(self):
        "Begin the maximum anew."
        Path(f'/proc/{self.process.pid}/clear_refs').write_text('5')


@contextmanager
def serving(seconds=0):
    "A server; its reward takes some seconds a request."
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, 'trial_reward.py').write_text(REWARD)
        root = Path(__file__).resolve().parent.parent.parent
        env = {**os.environ, 'PYTHONPATH': str(root), 'OMP_NUM_THREADS': '1', 'TRIAL_SECONDS': str(seconds)}
        env.pop('EGRPO_TOKEN', None)
        command = [sys.executable, '-m', 'egrpo', 'serve', '--reward', 'trial_reward.py:brightness', '--port', '0']
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=env, cwd=folder)
        try:
            line = process.stdout.readline()
            yield Server(process, int(re.search(r'127\.0\.0\.1:(\d+)', line)[1]))
        finally:
            process.kill()
            process.wait()


@dataclass
class Honest:
    "A client that asks again and again, in a thread."
    port:int
    waits:list = field(default_factory=list) # Seconds
    failures:list = field(default_factory=list) # What was said
    over:threading.Event = field(default_factory=threading.Event)

    def run(self, pause=.05):
        client = RewardClient(f'http://127.0.0.1:{self.port}', 60, token='')
        images = torch.rand(4, 3, 64, 64)
        while not self.over.is_set():
            began = time.monotonic()
            try: client(images, ['a'] * 4)
            except ValueError as e: self.failures.append(str(e))
            self.waits.append(time.monotonic() - began)
            time.sleep(pause)

    @contextmanager
    def asking(self):
        "It asks as long as this lasts."
        thread = threading.Thread(target=self.run)
        thread.start()
        try: yield self
        finally:
            self.over.set()
            thread.join()


def under_attack(server, attack):
    "A row: one attack."
    with Honest(server.port).asking() as honest:
        while not honest.waits: time.sleep(.1)
        before = server.memory()
        server.forget()
        command = [sys.executable, __file__, attack.__name__, str(server.port)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=4 * SECONDS)
        if done.returncode: raise RuntimeError(done.stderr)
        time.sleep(1)
    grown, longest = server.memory('VmHWM') - before, max(honest.waits)
    answers = ' '.join(sorted({o.split()[1] if o.startswith('HTTP') else o for o in done.stdout.splitlines()}))
    bad = grown > MEGABYTES or longest > WAIT or len(honest.failures) > 0
    figures = f'+{grown:.0f} MB at most; an honest client waits {longest:.2f} s at most in {len(honest.waits)} requests'
    if honest.failures: figures += f', {len(honest.failures)} failed: {honest.failures[0]}'
    return Row(attack.__name__.replace('_', ' '), 1, int(bad), figures + (f'; answers {answers}' if answers else ''))


def at_once(server, n=200):
    "A row: n clients connect at the same moment."
    body, answers = request_of(png(8)), []
    start = threading.Barrier(n)
    def ask():
        start.wait()
        answers.append(send(server.port, head(len(body)), body))
    all_at_once(n, ask)
    lost = [o for o in answers if ' 200 ' not in o]
    return Row(f'{n} clients at once', n, n - len(answers) + len(lost), ' '.join(sorted(set(lost))))


def large_requests(server, n=6):
    "A row: n clients, each with the largest request there is, which the server has room for only one after the other."
    images = torch.rand(16, 3, 1024, 1024)
    answers = []
    def ask():
        try: answers.append(RewardClient(f'http://127.0.0.1:{server.port}', retries=0, token='')(images, ['a'] * 16).shape)
        except RewardError as e: failures.append(str(e))
    failures = []
    server.forget()
    before, began = server.memory(), time.monotonic()
    threads = [threading.Thread(target=ask) for _ in range(n)]
    for t in threads: t.start()
    for t in threads: t.join()
    grown = server.memory('VmHWM') - before
    figures = f'{time.monotonic() - began:.0f} s, +{grown:.0f} MB at most ' + ' '.join(failures[:1])
    return Row(f'{n} clients with the largest request', n, n - len(answers) + (grown > MEGABYTES), figures)


def load(server, seconds, clients=4):
    "A row: clients that ask without pause."
    honest = [Honest(server.port) for _ in range(clients)]
    threads = [threading.Thread(target=o.run, kwargs=dict(pause=0)) for o in honest]
    for t in threads: t.start()
    time.sleep(seconds / 6)
    before = server.memory()
    time.sleep(seconds * 5 / 6)
    for o in honest: o.over.set()
    for t in threads: t.join()
    waits, failures = sum([o.waits for o in honest], []), sum([o.failures for o in honest], [])
    grown = server.memory() - before
    figures = f'{len(waits)/seconds:.0f} requests a second, {len(failures)} failed, {max(waits):.2f} s at most, {grown:+.0f} MB'
    return Row(f'load for {seconds:.0f} s', len(waits), len(failures) + (grown > 50), figures)


def ends(name, seconds):
    "A row: a signal while a request of some seconds is scored, or none."
    answers, body = [], request_of(png(8))
    with serving(seconds) as server:
        def ask(): answers.append(send(server.port, head(len(body)), body))
        thread = threading.Thread(target=ask, daemon=True)
        if seconds: thread.start()
        time.sleep(1)
        began = time.monotonic()
        server.process.send_signal(getattr(signal, name))
        code = server.process.wait(30)
        took = time.monotonic() - began
        if seconds: thread.join(5)
    lost = 0 < seconds < 5 and answers != ['HTTP/1.0 200 OK'] # more than five seconds are not waited for
    trial = f"{name}, {f'{seconds} s from an answer' if seconds else 'idle'}"
    return Row(trial, 1, int(code != 0 or lost), f"exit code {code} after {took:.1f} s {' '.join(answers)}")


# A hostile server

def drip_answer(connection):
    connection.sendall(b'HTTP/1.0 200 OK\r\n\r\n')
    for _ in range(40):
        connection.sendall(b' ')
        time.sleep(.5)


def drip_head(connection):
    connection.sendall(b'HTTP/1.0 200 OK\r\nA: ')
    for _ in range(40):
        connection.sendall(b'a')
        time.sleep(.5)


def large_answer(connection):
    connection.sendall(b'HTTP/1.0 200 OK\r\n\r\n')
    for _ in range(1500): connection.sendall(bytes(2**20))


def redirect(connection): connection.sendall(b'HTTP/1.0 302 Found\r\nLocation: http://127.0.0.1:9/\r\n\r\n')
def deep_answer(connection): connection.sendall(b'HTTP/1.0 200 OK\r\n\r\n' + b'[' * 60_000)


def hostile(answer, timeout=2):
    "A row: what a client makes of an answer."
    def serve():
        connection, _ = listening.accept()
        with connection, suppress(OSError):
            connection.recv(2**16)
            answer(connection)
    with socket.create_server(('127.0.0.1', 0)) as listening:
        threading.Thread(target=serve, daemon=True).start()
        client = RewardClient(f'http://127.0.0.1:{listening.getsockname()[1]}', timeout, retries=0, token='')
        before, began = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.monotonic()
        try: said = str(client(torch.zeros(1, 3, 8, 8), ['a']))
        except RewardError as e: said = str(e).partition(') ')[2]
        took = time.monotonic() - began
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    return Row(f"answer: {answer.__name__.replace('_', ' ')}", 1, int(took > timeout + 1 or grown > 50 or said.startswith('tensor')),
               f'{took:.1f} s, {grown:+.0f} MB: {said}')


def trials():
    "Every attack, the hostile answers, the ends, and the load."
    with serving() as server:
        for attack in ATTACKS: yield under_attack(server, attack)
        yield at_once(server)
        yield large_requests(server)
        yield load(server, float(os.environ.get('EGRPO_TRIAL_SECONDS', 60)))
    for answer in (drip_answer, drip_head, large_answer, redirect, deep_answer): yield hostile(answer)
    for name in ('SIGTERM', 'SIGINT'):
        for seconds in (0, 3, 20): yield ends(name, seconds)


if __name__ == '__main__': globals()[sys.argv[1]](int(sys.argv[2]))
