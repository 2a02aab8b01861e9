"A judge behind a chat endpoint: what it answers is what is scored, and a server that is slow, wrong, busy or away never becomes a score."
import json
import math
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch

from egrpo.rewards.judge import judge
from egrpo.rewards.published import RewardError
from egrpo.rewards.reward import get_reward, score

images = torch.rand(3, 3, 8, 8, generator=torch.Generator().manual_seed(0))
prompts = ['a dog', 'a cat', 'two {odd} cats']


def words(**probabilities):
    "A whole answer with these probabilities of its first token."
    tokens = [dict(token=word, logprob=math.log(p)) for word, p in probabilities.items()]
    choice = dict(message=dict(role='assistant', content=next(iter(probabilities))), logprobs=dict(content=[dict(top_logprobs=tokens)]))
    return dict(choices=[choice])


def text(content): return dict(choices=[dict(message=dict(role='assistant', content=content))])


@pytest.fixture
def server():
    "A function that makes a server of a list of answers, (status, JSON) or (status, JSON, header); the last one is repeated."
    servers = []

    def serve(*answers, wait=0.):
        requests, lock = [], threading.Lock()

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *args): pass

            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers['Content-Length'])))
                with lock:
                    requests.append(dict(body=body, path=self.path, token=self.headers.get('Authorization'), at=time.monotonic()))
                    status, reply, *headers = answers[min(len(requests), len(answers)) - 1]
                time.sleep(wait)
                data = reply if isinstance(reply, bytes) else json.dumps(reply).encode()
                self.send_response(status)
                for header in headers: self.send_header(*header)
                self.send_header('Content-Length', str(len(data)))
                self.end_headers()
                try: self.wfile.write(data)
                except OSError: pass

        made = ThreadingHTTPServer(('127.0.0.1', 0), Handler)
        servers.append(made)
        threading.Thread(target=made.serve_forever, daemon=True).start()
        return f'http://127.0.0.1:{made.server_port}/v1', requests

    yield serve
    for made in servers:
        made.shutdown()
        made.server_close()


def question(request): return request['body']['messages'][0]['content'][1]['text']


def test_the_request_is_the_protocols(server):
    url, requests = server((200, words(Yes=.6, No=.2)))
    torch.testing.assert_close(score(judge(url, 'qwen', token='secret', workers=1), images, prompts), torch.full((3,), .75))
    body = requests[0]['body']
    assert requests[0]['path'] == '/v1/chat/completions' and requests[0]['token'] == 'Bearer secret'
    assert (body['model'], body['max_tokens'], body['temperature'], body['logprobs'], body['top_logprobs']) == ('qwen', 1, 0, True, 20)
    assert body['messages'][0]['content'][0]['image_url']['url'].startswith('data:image/png;base64,iVBOR')
    assert question(requests[2]) == 'Does this image show "two {odd} cats"? Answer Yes or No.'


@pytest.mark.parametrize('reply, read, wanted', [
    (words(Yes=.5, yes=.1, No=.3, Well=.1), 'yes', .6 / .9),
    (words(No=.9, Yes=1e-9), 'yes', 0.),
    (words(Excellent=.5, Good=.25, bad=.25), 'levels', .6875),
    (words(Fair=.3, I=.7), 'levels', .5),
    (text('Alignment Score (1-5): 4\nStyle Score (1-5): 2.5'), 'number', 3.25),
    (text('7'), 'number', 7.),
], ids=['yes', 'no', 'levels', 'one-level', 'numbers', 'number'])
def test_answers_are_read(server, reply, read, wanted):
    url, _ = server((200, reply))
    found = judge(url, 'm', ask='Rate {prompt}', read=read)(images[:1], prompts[:1])
    assert found.item() == pytest.approx(wanted, abs=1e-6)


def test_atoms_average_the_right_words(server):
    url, requests = server((200, words(two=.5, yes=.8, **{'2': .25})))
    atoms = {'a dog': [('Is it a dog?', 'yes'), ('How many?', 'two|2'), ('Is it blue?', 'no')]}
    assert judge(url, 'm', atoms=atoms)(images[:1], ['a dog']).item() == pytest.approx((.8 + .75 + 0) / 3)
    assert judge(url, 'm', atoms=atoms, geometric=True)(images[:1], ['a dog']).item() == pytest.approx((.8 * .75 * 1e-9)**(1 / 3))
    assert question(requests[0]) == 'Is it a dog? Answer in one word.'
    with pytest.raises(ValueError, match="has no atoms for prompt 'a cat'"): judge(url, 'm', atoms=atoms).check(['a dog', 'a cat'])


def test_an_image_and_question_are_asked_once(server):
    url, requests = server((200, words(Yes=.5, No=.5)))
    reward = judge(url, 'm')
    reward(images, prompts)
    assert len(requests) == 3
    reward(images.clone(), prompts)
    assert len(requests) == 3
    reward(images, ['a cow', *prompts[1:]])
    reward(1 - images, prompts)
    assert len(requests) == 3 + 1 + 3


def test_requests_run_side_by_side(server):
    url, requests = server((200, words(Yes=.5, No=.5)), wait=.5)
    judge(url, 'm', workers=3)(images, prompts)
    assert requests[2]['at'] - requests[0]['at'] < .4


@pytest.mark.parametrize('reply, says', [
    ((400, dict(error='no such model')), r"judge\(http://127.0.0.1:\d+/v1, m\) refused: no such model"),
    ((401, dict(error='key')), 'refused: key'),
    ((200, words(Sorry=1.)), "answered none of yes, no, but 'sorry'"),
    ((200, text('Yes')), 'gave no log-probabilities: serve a model with logprobs'),
    ((200, dict(choices=[])), 'answered without choices'),
    ((200, dict(hello=1)), 'answered without choices'),
], ids=['model', 'token', 'words', 'logprobs', 'empty', 'other'])
def test_a_wrong_answer_raises_at_once(server, reply, says):
    url, requests = server(reply)
    with pytest.raises(RewardError, match=says): judge(url, 'm', workers=1)(images[:1], prompts[:1])
    assert len(requests) == 1


def test_a_rubric_without_numbers_raises(server):
    url, _ = server((200, text('lovely')))
    with pytest.raises(RewardError, match="named no number: 'lovely'"): judge(url, 'm', 'Rate {prompt}', 'number')(images[:1], prompts[:1])


def test_a_busy_server_is_asked_again(server):
    url, requests = server((503, dict(error='loading'), ('Retry-After', '0')), (429, b''), (200, words(Yes=1.)))
    assert judge(url, 'm', retries=2)(images[:1], prompts[:1]).item() == 1
    assert len(requests) == 3


def test_a_slow_server_is_given_up(server):
    url, requests = server((200, words(Yes=1.)), wait=1)
    with pytest.raises(RewardError, match=r'has not answered within 0.2 s, asked 2 times'):
        judge(url, 'm', timeout=.2, retries=1)(images[:1], prompts[:1])
    assert len(requests) == 2


def test_a_server_that_is_away_is_said():
    with pytest.raises(RewardError, match=r'is not there \(.*asked 1 times: start its server'):
        judge('http://127.0.0.1:9/v1', 'm', retries=0)(images[:1], prompts[:1])


def test_a_judge_is_named_in_a_sum(server):
    url, _ = server((200, words(Yes=.8, No=.2, Good=.5, bad=.5)))
    rewards = get_reward(f'judge({url}, m) + 0.5*judge({url}, m, levels)')
    torch.testing.assert_close(rewards.total(images, prompts), torch.full((3,), .8 + .5 * .375))
    assert 'secret' not in repr(get_reward('judge(http://host/v1?key=secret, m)'))
    with pytest.raises(ValueError, match='takes no user:password@'): get_reward('judge(http://me:secret@host/v1, m)')
    with pytest.raises(ValueError, match='read must be one of'): get_reward(f'judge({url}, m, words)')
    with pytest.raises(ValueError, match='needs an address and a model'): get_reward(f'judge({url})')


def test_another_question_is_another_reward():
    "Its name says so, by which a run that goes on is compared."
    atoms = {'a dog': [('a dog?', 'yes')]}
    ways = [dict(), dict(read='levels'), dict(ask='Is "{prompt}" here?'), dict(ask='Is "{prompt}" there?'), dict(atoms=atoms),
            dict(atoms=atoms, geometric=True), dict(atoms='questions')]
    names = [judge('http://127.0.0.1:8000/v1', 'm', **way).spec for way in ways]
    assert len(set(names)) == len(names) and names[0] == 'judge(http://127.0.0.1:8000/v1, m)'
