"""``loftq-kernels serve``: the openai package asks a real server on loopback; answers are those of `generate`."""

from __future__ import annotations

import contextlib
import gc
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import gaussian

import loftq_kernels as lk
from loftq_kernels import cli
from loftq_kernels.cli.serve import _OFFLINE
from loftq_kernels.nn.adapters import adapter_parameters

transformers = pytest.importorskip("transformers")
openai = pytest.importorskip("openai")
pytest.importorskip("fastapi")
tokenizers = pytest.importorskip("tokenizers")

from loftq_kernels.integrations import serving  # noqa: E402

REPOSITORY = Path(__file__).parents[1]
SPECIAL = ["<unk>", "<s>", "</s>"]
WORDS = [f"w{i}" for i in range(61)]
NAMES = ("tiny", "one", "two")  # the model, and adapters of it
PROMPTS = ("w1 w2 w3", "w7", "w30 w4", "w5 w5 w5 w5 w6", "w60 w0")
LONG = 100_000  # tokens, which take minutes: what asks for so many is still under way
SECONDS = 60


@pytest.fixture(autouse=True)
def _as_it_was(monkeypatch):
    """The command changes the environment of its process, and transformers' server how much transformers says."""
    for name in _OFFLINE:
        monkeypatch.setenv(name, "1")
    verbosity = transformers.logging.get_verbosity()
    yield
    transformers.logging.set_verbosity(verbosity)


def tiny_tokenizer():
    """A word is a token; a chat is its messages after the first token."""
    vocabulary = {word: i for i, word in enumerate([*SPECIAL, *WORDS])}
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    made = transformers.PreTrainedTokenizerFast(
        tokenizer_object=words, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    )
    made.chat_template = "{{ bos_token }}{% for message in messages %} {{ message['content'] }}{% endfor %}"
    return made


def tiny_llama(hidden_size: int = 64):
    """It never ends by itself: there is no eos token."""
    sizes = {"num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2, "intermediate_size": 96}
    ids = {"vocab_size": 64, "bos_token_id": 1, "eos_token_id": None, "pad_token_id": 0}
    config = transformers.LlamaConfig(hidden_size=hidden_size, max_position_embeddings=2 * LONG, **sizes, **ids)
    return transformers.LlamaForCausalLM(config).eval()


def quantized(model):
    lk.quantize_model(model, lk.QuantConfig(rank=4, num_iter=1))
    return model


def save(model, folder: Path) -> None:
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)


def generated(model, inputs: Any, count: int, **options: Any) -> str:
    """What transformers' generate answers, greedily."""
    out = model.generate(**inputs, max_new_tokens=count, do_sample=False, **options)
    return tiny_tokenizer().decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


@dataclass(frozen=True)
class World:
    place: Path
    models: dict[str, Any]  # by what name it is served: the model itself, as it was when its adapter was saved

    def answer(self, name: str, prompt: str, count: int = 6, **options: Any) -> str:
        return generated(self.models[name], tiny_tokenizer()(prompt, return_tensors="pt"), count, **options)

    def chat(self, name: str, prompt: str, count: int = 6) -> str:
        messages = [{"role": "user", "content": prompt}]
        inputs = tiny_tokenizer().apply_chat_template(messages, return_tensors="pt", return_dict=True)
        return generated(self.models[name], inputs, count)


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> World:
    """A folder of a quantized model, of adapters trained on it, and of what cannot be served."""
    place = tmp_path_factory.mktemp("world")
    torch.manual_seed(0)
    dense = tiny_llama()
    save(dense, place / "dense")
    base = quantized(dense)
    save(base, place / "tiny")
    base.save_pretrained(place / "wordless")
    models = {"tiny": base}
    for seed, name in enumerate(NAMES[1:], start=1):
        models[name] = trained = lk.load_quantized(place / "tiny")
        for i, parameter in enumerate(adapter_parameters(trained).values()):
            parameter.data += 0.3 * gaussian(*parameter.shape, seed=100 * seed + i)
        lk.save_adapter(trained, place / name, start=base)
    lk.save_adapter(quantized(tiny_llama(hidden_size=128)), place / "stranger")
    shutil.copytree(place / "one", place / "damaged")
    with open(place / "damaged" / "adapter_model.safetensors", "r+b") as file:
        file.truncate(1000)
    small = {"vocab_size": 64, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1}
    bert = transformers.BertModel(transformers.BertConfig(num_attention_heads=2, **small))
    save(quantized(bert), place / "encoder")
    t5 = transformers.T5Config(vocab_size=64, d_model=64, d_kv=32, d_ff=96, num_layers=1, num_heads=2)
    save(quantized(transformers.T5ForConditionalGeneration(t5)), place / "translator")
    return World(place, models)


@dataclass(frozen=True)
class Served:
    url: str
    model: Any
    processor: Any
    server: serving.Server
    forwards: list[int]  # one entry for each call of the model
    client: openai.OpenAI

    def post(self, path: str, body: bytes, content_type: str = "application/json") -> tuple[int, str]:
        """As curl does."""
        request = urllib.request.Request(self.url + path, body, {"Content-Type": content_type})
        try:
            with urllib.request.urlopen(request, timeout=SECONDS) as response:
                return response.status, response.read().decode()
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode()


@contextlib.contextmanager
def running(model, processor, folder: Path) -> Iterator[Served]:
    """A server in a thread, at a port that was free."""
    made = serving.server(model, processor, bases=["tiny", str(folder)], adapters=NAMES[1:])
    forwards: list[int] = []
    counting = model.register_forward_hook(lambda *_: forwards.append(1))
    with socket.socket() as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 11)
        sock.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{sock.getsockname()[1]}"
        thread = threading.Thread(target=made.run, kwargs={"sockets": [sock]}, daemon=True)
        thread.start()
        wait_for(lambda: made.started)
        try:
            yield Served(url, model, processor, made, forwards, client_of(f"{url}/v1"))
        finally:
            made.should_exit = True
            thread.join(SECONDS)
            counting.remove()
    assert not thread.is_alive()


def client_of(url: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=url, api_key="none", max_retries=0, timeout=SECONDS)


def wait_for(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + SECONDS
    while not condition():
        assert time.monotonic() < end, "it has not happened within a minute"
        time.sleep(0.01)


@pytest.fixture(scope="module")
def loaded(world) -> tuple[Any, Any]:
    model, processor = serving.load(world.place / "tiny", "cpu")
    for name in NAMES[1:]:
        lk.load_adapter(model, world.place / name, name=name)
    return model, processor


@pytest.fixture(scope="module")
def served(world, loaded) -> Iterator[Served]:
    with running(*loaded, world.place / "tiny") as own:
        yield own


def ask(client: openai.OpenAI, name: str, prompt: str, count: int = 6, **options: Any) -> Any:
    return client.completions.create(model=name, prompt=prompt, max_tokens=count, temperature=0, **options)


class TestAnswers:
    def test_adapters_differ(self, world):
        assert len({world.answer(name, PROMPTS[0]) for name in NAMES}) == 3

    @pytest.mark.parametrize("name", NAMES)
    def test_chat(self, world, served, name):
        messages = [{"role": "user", "content": PROMPTS[0]}]
        said = served.client.chat.completions.create(model=name, messages=messages, max_tokens=6, temperature=0)
        assert said.choices[0].message.content == world.chat(name, PROMPTS[0])
        assert (said.model, said.choices[0].finish_reason, said.usage.completion_tokens) == (name, "length", 6)

    @pytest.mark.parametrize("name", NAMES)
    def test_chat_as_a_stream(self, world, served, name):
        options = {"messages": [{"role": "user", "content": PROMPTS[0]}], "max_tokens": 6, "temperature": 0}
        pieces = list(served.client.chat.completions.create(model=name, stream=True, **options))
        assert "".join(piece.choices[0].delta.content or "" for piece in pieces) == world.chat(name, PROMPTS[0])
        assert len(pieces) > 2 and pieces[-1].choices[0].finish_reason == "length"

    def test_a_folder_names_its_model(self, world, served):
        said = ask(served.client, str(world.place / "tiny"), PROMPTS[1])
        assert said.choices[0].text == world.answer("tiny", PROMPTS[1])

    def test_responses(self, world, served):
        options = {"max_output_tokens": 6, "temperature": 0, "stream": False}
        said = served.client.responses.create(model="two", input=PROMPTS[0], **options)
        assert said.output_text == world.chat("two", PROMPTS[0])

    def test_beams_have_the_adapter_of_their_request(self, world, served):
        """The batch has more rows than the request: all have its adapter."""
        wanted = {"generation_config": json.dumps({"num_beams": 3, "pad_token_id": 0})}
        said = ask(served.client, "one", PROMPTS[0], extra_body=wanted)
        assert said.choices[0].text == world.answer("one", PROMPTS[0], num_beams=3)

    def test_models_are_listed(self, served):
        listed = {model.id: model.parent for model in served.client.models.list()}
        assert listed == {"tiny": None, "one": "tiny", "two": "tiny"}

    def test_ten_at_once(self, world, served):
        """Plain ones and streams, of all names: each gets the tokens of its own adapter."""
        asked = [(NAMES[i % 3], PROMPTS[i % 5], i % 2 == 0) for i in range(10)]

        def answer(name: str, prompt: str, stream: bool) -> str:
            said = ask(served.client, name, prompt, 20, stream=stream)
            return "".join(piece.choices[0].text for piece in (said if stream else [said]))

        with ThreadPoolExecutor(10) as pool:
            answers = list(pool.map(lambda one: answer(*one), asked))
        assert answers == [world.answer(name, prompt, 20) for name, prompt, _ in asked]


class TestRefusals:
    @pytest.fixture
    def nothing_is_loaded(self, monkeypatch):
        def load(*_, **__):
            pytest.fail("something is loaded")

        for owner in (transformers.AutoConfig, transformers.AutoProcessor, transformers.PreTrainedModel):
            monkeypatch.setattr(owner, "from_pretrained", load)

    @pytest.mark.parametrize("name", ["nobody", "{place}/dense", "tiny@main", "one:other.gguf", "gpt2", ""])
    def test_a_wrong_name(self, world, served, nothing_is_loaded, name):
        name = name.format(place=world.place)
        with pytest.raises(openai.NotFoundError, match="there is no model .* here; served are: tiny, ") as error:
            ask(served.client, name, "w1")
        assert error.value.code == "model_not_found" and repr(name)[1:-1] in str(error.value)

    @pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/responses", "/v1/systemone", "/load_model"])
    def test_at_every_endpoint(self, world, served, nothing_is_loaded, path):
        body = {"model": str(world.place / "dense")}
        if path == "/v1/systemone":
            body |= {"state": "w1", "questions": {"a": {"type": "noul"}}}
        status, text = served.post(path, json.dumps(body).encode())
        assert (status, json.loads(text)["error"]["code"]) == (404, "model_not_found")

    @pytest.mark.parametrize(
        ("path", "body", "status", "message"),
        [
            ("/v1/chat/completions", b'{"messages": []}', 400, "the request names no model; served are: tiny, "),
            ("/v1/chat/completions", b'{"model": 5}', 400, "the request names no model"),
            ("/v1/chat/completions", b'{"model": "tiny"}', 400, "the request lacks 'messages'"),
            ("/v1/chat/completions", b'{"model": "tiny", "colour": 1}', 422, "Unexpected fields"),
            ("/v1/chat/completions", b'{"model": "tiny", "messages": "hi"}', 400, "messages must be a list of objects"),
            ("/v1/chat/completions", b'{"model": "tiny", "messages": [], "tools": 3}', 400, "tools must be a list"),
            ("/v1/completions", b'{"model": "tiny", "prompt": 5}', 400, "prompt must be a string"),
            ("/v1/completions", b"{", 422, "JSON"),
            ("/v1/embeddings", b'{"model": "tiny", "input": "w1"}', 404, "Not Found"),
        ],
    )
    def test_a_wrong_request(self, served, path, body, status, message):
        code, text = served.post(path, body)
        assert code == status and message in json.loads(text)["error"]["message"]

    @pytest.mark.parametrize("key", ["messages", "input"])
    @pytest.mark.parametrize(
        "part",
        [
            {"type": "image_url", "image_url": {"url": "http://192.0.2.1/cat.png"}},
            {"type": "input_image", "image_url": "/etc/passwd"},
            {"type": "video_url", "video_url": {"url": "film.mp4"}},
            {"type": "audio_url", "audio_url": {"url": "https://192.0.2.1/a.wav"}},
            {"type": "input_audio", "input_audio": "/etc/passwd"},
            {"type": "input_audio", "input_audio": {"data": "/etc/passwd"}},
        ],
        ids=lambda part: str(part.get("type")) if isinstance(part, dict) else part,
    )
    def test_what_would_be_fetched_or_opened(self, served, key, part):
        path = {"messages": "/v1/chat/completions", "input": "/v1/responses"}[key]
        for items in ([{"role": "user", "content": [part]}], [part]):
            for content_type in ("application/json", "application/other+json"):
                status, text = served.post(path, json.dumps({"model": "tiny", key: items}).encode(), content_type)
                assert status == 400 and "is not fetched or opened for a request" in text

    def test_data_is_neither_fetched_nor_opened(self, world, served):
        """A model of text leaves images out, as transformers' server does."""
        image = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}
        content = [{"type": "text", "text": PROMPTS[0]}, image]
        messages = [{"role": "user", "content": content}]
        said = served.client.chat.completions.create(model="one", messages=messages, max_tokens=6, temperature=0)
        assert said.choices[0].message.content == world.chat("one", PROMPTS[0])

    def test_a_chat_without_a_template(self, served, monkeypatch):
        monkeypatch.setattr(served.processor, "chat_template", None)
        with pytest.raises(openai.BadRequestError, match="chat_template is not set"):
            served.client.chat.completions.create(model="tiny", messages=[{"role": "user", "content": "w1"}])

    def test_nobody_unloads_the_model(self, world, served):
        assert served.post("/reset", b"")[0] == 200
        assert served.post("/load_model", b'{"model": "one"}') == (
            200,
            'data: {"status": "ready", "model": "one", "cached": true}\n\n',
        )
        assert ask(served.client, "one", PROMPTS[0]).choices[0].text == world.answer("one", PROMPTS[0])


class TestClients:
    @pytest.fixture
    def no_garbage_is_collected(self):
        """Else the end of a test may depend on what a collection happens to find."""
        gc.disable()
        yield
        gc.enable()

    @pytest.mark.parametrize("reads", [True, False], ids=["waiting for a token", "not reading"])
    def test_one_is_killed_in_mid_stream(self, world, served, no_garbage_is_collected, reads):
        """Its answer ends, and the next request has its own adapter. Who does not read has the server wait to send."""
        before = len(served.forwards)
        body = json.dumps({"model": "two", "prompt": "w1", "max_tokens": LONG, "stream": True}).encode()
        head = (
            f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(body)}"
        )
        host, port = served.url.removeprefix("http://").split(":")
        with socket.socket() as client:
            client.settimeout(SECONDS)
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 11)
            client.connect((host, int(port)))
            client.sendall(f"{head}\r\n\r\n".encode() + body)
            received = b""
            while received.count(b"data: ") < 3:
                received += client.recv(1000)
            if not reads:
                wait_for(lambda: len(served.forwards) - before > 600)  # more than all buffers hold
        assert ask(served.client, "one", PROMPTS[0]).choices[0].text == world.answer("one", PROMPTS[0])
        assert len(served.forwards) - before < LONG

    def test_answers_end_when_the_server_does(self, world, loaded):
        """Both kinds of request hear of it; the model computes afterwards as it did before."""
        with running(*loaded, world.place / "tiny") as own:
            stream = ask(own.client, "one", "w1", LONG, stream=True)
            next(iter(stream))
            with ThreadPoolExecutor() as pool:
                plain = pool.submit(ask, own.client, "two", "w1", LONG)
                wait_for(lambda: len(own.server.server_state.tasks) == 2)
                own.server.should_exit = True
                with pytest.raises(openai.InternalServerError, match="503.*the server is stopping"):
                    plain.result(SECONDS)
            with pytest.raises(openai.APIError):
                list(stream)
        assert generated(own.model, tiny_tokenizer()("w1", return_tensors="pt"), 3) == world.answer("tiny", "w1", 3)


LOOPBACK_ONLY = """
import sys
def watch(event, arguments):
    if event in ("socket.connect", "socket.getaddrinfo"):
        host = arguments[1] if event == "socket.connect" else arguments[:1]
        if isinstance(host, tuple) and host[0] not in ("127.0.0.1", None):
            print("reaches for", *map(str, host), file=sys.stderr)
sys.addaudithook(watch)
"""


class TestCommand:
    def test_from_the_shell(self, world, tmp_path):
        """It reads nothing but its folders, reaches for no network, and ends by Ctrl-C while it answers."""
        (tmp_path / "sitecustomize.py").write_text(LOOPBACK_ONLY)
        online = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
        online |= {"PYTHONPATH": f"{tmp_path}:{REPOSITORY}", "HF_HOME": str(tmp_path / "hub")}
        command = [sys.executable, "-m", "loftq_kernels", "serve", "tiny", "--port", "0", "--adapter", "one=one"]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        with subprocess.Popen(command, cwd=world.place, env=online, text=True, **pipes) as process:
            try:
                line = process.stdout.readline()
                said = re.fullmatch(r"serving tiny, one at (http://127\.0\.0\.1:\d+/v1); Ctrl-C ends it\n", line)
                assert said, line + process.stderr.read()
                client = client_of(said[1])
                for name in ("tiny", "one"):
                    assert ask(client, name, PROMPTS[0]).choices[0].text == world.answer(name, PROMPTS[0])
                next(iter(ask(client, "one", "w1", LONG, stream=True)))
                process.send_signal(signal.SIGINT)
                out, errors = process.communicate(timeout=SECONDS)
            finally:
                process.kill()
        assert (process.returncode, out.splitlines()[-1]) == (0, "stopped")
        assert "Traceback" not in errors and "reaches for" not in errors, errors

    def test_terminated(self, world, monkeypatch, capsys):
        monkeypatch.chdir(world.place)
        ended = []

        def terminate(self, sockets=None):
            ended.append(sockets[0].getsockname())
            os.kill(os.getpid(), signal.SIGTERM)
            return original(self, sockets)

        original = serving.Server.startup
        monkeypatch.setattr(serving.Server, "startup", terminate)
        before = signal.getsignal(signal.SIGTERM)
        assert cli.main(["serve", "tiny", "--port", "0"]) == 0
        assert capsys.readouterr().out.endswith("stopped\n") and ended[0][0] == "127.0.0.1"
        assert signal.getsignal(signal.SIGTERM) is before

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ("nowhere", "nowhere is not a folder"),
            ("dense", "dense holds no model that loftq_kernels has quantized: loftq-kernels quantize dense OUT_DIR"),
            ("encoder", "encoder holds a BertModel, which generates no text: .* no endpoint for embeddings"),
            ("translator", "translator holds a T5ForConditionalGeneration, an encoder-decoder of text: "),
            ("wordless", "wordless has no tokenizer: "),
            ("tiny --adapter x=nowhere", r"--adapter x=nowhere: nowhere/adapter_config.json does not exist"),
            ("tiny --adapter x=dense", r"--adapter x=dense: dense/adapter_config.json does not exist"),
            ("tiny --adapter x=damaged", "--adapter x=damaged: .* is not a readable safetensors file"),
            ("tiny --adapter x=stranger", "--adapter x=stranger: .* has shape .* needs "),
            ("tiny --adapter tiny=one", "--adapter tiny=one: 'tiny' is the name of tiny"),
            ("tiny --adapter a=one --adapter a=two", "--adapter a=two: 'a' is the name of one"),
            ("tiny --host 192.0.2.1", "--host 192.0.2.1 --port 8000: Cannot assign requested address"),
            ("tiny --device meta", "--device meta holds no values"),
            (
                "tiny --port {port}",
                "--host 127.0.0.1 --port {port}: Address already in use; .*--port 0 is any free one",
            ),
        ],
    )
    def test_what_cannot_be_served(self, world, monkeypatch, capfd, arguments, message):
        """One sentence and status 2, before anything listens."""
        monkeypatch.chdir(world.place)
        with socket.create_server(("127.0.0.1", 0)) as taken:
            port = taken.getsockname()[1]
            status = cli.main(["serve", *arguments.format(port=port).split()])
        errors = capfd.readouterr().err
        assert status == 2 and errors.count("\n") == 1, errors
        assert re.match(f"loftq-kernels: {message.format(port=port)}", errors), errors

    def test_every_network_is_said(self, world, monkeypatch, capsys):
        monkeypatch.chdir(world.place)
        monkeypatch.setattr(serving.Server, "run", lambda self, sockets: None)
        assert cli.main(["serve", "tiny", "--host", "0.0.0.0", "--port", "0"]) == 0
        assert "warning: 0.0.0.0 is no loopback address" in capsys.readouterr().err


class TestInstallation:
    @pytest.mark.parametrize(
        ("missing", "message"),
        [
            ("fastapi", r"the server needs fastapi: pip install 'loftq_kernels\[serve\]'"),
            ("openai", r"the server needs openai: pip install 'loftq_kernels\[serve\]'"),
            ("uvicorn", r"the server needs uvicorn: pip install 'loftq_kernels\[serve\]'"),
            ("transformers.cli.serve", f"transformers {transformers.__version__} has another server than those of"),
        ],
    )
    def test_something_is_missing(self, world, monkeypatch, capsys, missing, message):
        monkeypatch.chdir(world.place)
        monkeypatch.setitem(sys.modules, missing, None)
        monkeypatch.delitem(sys.modules, "loftq_kernels.integrations.serving")
        monkeypatch.delattr(sys.modules["loftq_kernels.integrations"], "serving")
        assert cli.main(["serve", "tiny"]) == 2
        assert re.match(f"loftq-kernels: {message}", capsys.readouterr().err)

    def test_an_adapter_that_is_not_loaded(self, loaded):
        with pytest.raises(ValueError, match="no adapter 'three' is loaded"):
            serving.server(*loaded, bases=["tiny"], adapters=["three"])

    def test_a_server_that_is_other_than_known(self, world, loaded, monkeypatch):
        from transformers.cli.serving.model_manager import ModelManager

        monkeypatch.delattr(ModelManager, "process_model_name")
        with (
            pytest.raises(
                ImportError, match=f"transformers {transformers.__version__} has another .*process_model_name"
            ),
            running(*loaded, world.place / "tiny"),
        ):
            pass
