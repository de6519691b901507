"""Images through ``vllm serve`` and the official openai client: right answers, HTTP 400 with a reason, nothing else."""

from __future__ import annotations

import base64
import functools
import http.server
import io
import subprocess
import sys
import threading
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import openai
import pytest
from openai import OpenAI
from PIL import Image

from tests.support.images import Ask, Oracle, needs_images, picture
from tests.support.models import save_chatting_vlm
from tests.support.ports import reserved_port
from tests.support.servers import serving

EXAMPLES = Path(__file__).parents[2] / "examples"
TURN = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n<think></think>"
Parts = list[dict[str, Any]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    needs_images()
    return save_chatting_vlm(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def oracle(folder: Path) -> Oracle:
    return Oracle(folder)


@pytest.fixture(scope="module")
def client(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[OpenAI]:
    arguments = [str(folder), "--max-model-len", "256", "--kv-cache-memory-bytes", str(1 << 25), "--enforce-eager"]
    arguments += ["--limit-mm-per-prompt", '{"image": 2}']
    log = tmp_path_factory.mktemp("server") / "log"
    with reserved_port() as port, serving(arguments, port, log, fork=True):
        yield OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", timeout=300, max_retries=0)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a web server with one picture."""
    folder = tmp_path_factory.mktemp("pictures")
    picture(1).save(folder / "one.png")
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(folder))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def encoded(image: Image.Image, form: str = "PNG", **options: Any) -> bytes:
    with io.BytesIO() as file:
        image.save(file, form, **options)
        return file.getvalue()


def url_of(data: bytes, form: str = "png") -> str:
    return f"data:image/{form};base64,{base64.b64encode(data).decode()}"


def image_part(url: str) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": url}}


def text_part(text: str) -> dict[str, Any]:
    return {"type": "text", "text": text}


def ask(client: OpenAI, content: Parts | str, mode: str = "ar", tokens: int = 12, **extra: Any) -> Any:
    """Return the answer's only choice, with token ids."""
    body = {"vllm_xargs": {"nld.mode": mode}, "return_token_ids": True, "ignore_eos": True} | extra
    messages: Any = [{"role": "user", "content": content}]
    model = client.models.list().data[0].id
    return client.chat.completions.create(
        model=model, messages=messages, temperature=0, max_tokens=tokens, extra_body=body
    )


def expected(oracle: Oracle, folder: Path, text: str, images: list[Image.Image], tokens: int = 12) -> list[int]:
    """Return what the reference says; each image's place in ``text`` is its start token."""
    from transformers import AutoTokenizer

    ids = AutoTokenizer.from_pretrained(folder).encode(TURN.format(text), add_special_tokens=False)
    return oracle.answer(Ask(ids, images), "ar", tokens, eos_token_id=-1)


@pytest.mark.parametrize("mode", ["ar", "self_speculation", "auto"])
def test_answers_equal_the_reference(mode: str, client: OpenAI, oracle: Oracle, folder: Path) -> None:
    one, two = picture(1), picture(2, 300, 170)
    content = [image_part(url_of(encoded(one))), text_part("def f(self):"), image_part(url_of(encoded(two)))]
    answer = ask(client, content, mode)
    text = "<|image_start|>def f(self):<|image_start|>"
    assert answer.choices[0].model_extra["token_ids"] == expected(oracle, folder, text, [one, two])
    assert "<|image" not in answer.choices[0].message.content


@pytest.mark.parametrize(
    "image",
    [
        picture(3, 1, 1),
        picture(4, 3000, 8),
        Image.new("RGB", (5000, 4000), (200, 30, 30)),
        picture(5).convert("L"),
        picture(6).convert("CMYK"),
    ],
    ids=["one pixel", "long", "enormous", "gray", "CMYK"],
)
def test_unusual_pictures_are_read(image: Image.Image, client: OpenAI, oracle: Oracle, folder: Path) -> None:
    data = encoded(image, "TIFF")
    answer = ask(client, [image_part(url_of(data, "tiff")), text_part("x")])
    assert answer.choices[0].model_extra["token_ids"] == expected(oracle, folder, "<|image_start|>x", [image])


def test_files_from_the_web_and_other_formats(client: OpenAI, pictures: str) -> None:
    plain = ask(client, [image_part(url_of(encoded(picture(1)))), text_part("x")])
    webp = url_of(encoded(picture(1), "WEBP", lossless=True), "webp")
    for url in (f"{pictures}/one.png", webp):
        found = ask(client, [image_part(url), text_part("x")])
        assert found.choices[0].model_extra["token_ids"] == plain.choices[0].model_extra["token_ids"]


def test_text_needs_no_image(client: OpenAI, oracle: Oracle, folder: Path) -> None:
    for content in ("def f(self):", [text_part("def f(self):")]):
        answer = ask(client, content, "self_speculation")
        assert answer.choices[0].model_extra["token_ids"] == expected(oracle, folder, "def f(self):", [])


def test_answers_stream(client: OpenAI) -> None:
    content: Any = [image_part(url_of(encoded(picture(1)))), text_part("x")]
    for mode in ("self_speculation", "diffusion"):
        whole = ask(client, content, mode).choices[0].message.content
        stream = client.chat.completions.create(
            model=client.models.list().data[0].id,
            messages=[{"role": "user", "content": content}],
            temperature=0,
            max_tokens=12,
            stream=True,
            extra_body={"vllm_xargs": {"nld.mode": mode}, "ignore_eos": True},
        )
        assert "".join(chunk.choices[0].delta.content or "" for chunk in stream if chunk.choices) == whole


def test_example_runs(client: OpenAI, tmp_path: Path) -> None:
    file = tmp_path / "picture.webp"
    picture(1).save(file)
    command = [sys.executable, str(EXAMPLES / "describe_image.py"), str(file), "x", "--base-url", str(client.base_url)]
    found = subprocess.run([*command, "--max-tokens", "12"], capture_output=True, text=True)
    assert found.returncode == 0, found.stderr
    assert found.stdout.strip()


def bomb() -> bytes:
    """A PNG that says it has 10^10 pixels."""
    data = bytearray(encoded(Image.new("L", (1, 1))))
    data[16:24] = (100_000).to_bytes(4, "big") * 2
    import zlib

    data[29:33] = zlib.crc32(data[12:29]).to_bytes(4, "big")
    return bytes(data)


def broken_chunk() -> bytes:
    """A PNG whose second chunk of data has no such name: Pillow raises SyntaxError."""
    noise = np.random.default_rng(0).integers(0, 256, (200, 200, 3), np.uint8)
    data = bytearray(encoded(Image.fromarray(noise)))
    second = data.index(b"IDAT", data.index(b"IDAT") + 4)
    data[second : second + 4] = b"\x00\x01\x02\x03"
    return bytes(data)


GOOD = image_part(url_of(encoded(picture(1))))


@pytest.mark.parametrize(
    ("content", "extra", "words"),
    [
        ([image_part("data:image/png;base64,@@@")], {}, "base64"),
        ([image_part("data:image/png;base64,AAAA")], {}, "image"),
        ([image_part("data:image/png;base64,")], {}, "image"),
        ([image_part(url_of(encoded(picture(1))[:200]))], {}, "truncated"),
        ([image_part(url_of(bomb()))], {}, "pixels"),
        ([image_part(url_of(broken_chunk()))], {}, "broken PNG"),
        ([image_part("file:///etc/passwd")], {}, "local"),
        ([GOOD] * 3, {}, "At most 2 image"),
        ([GOOD], {"vllm_xargs": {"nld.mode": "quadratic"}}, "quadratic"),
        ([GOOD], {"vllm_xargs": {"nld.threshold": 7}}, "threshold"),
        ([GOOD], {"mm_processor_kwargs": {"max_image_size": 1400}}, "--trust-request-mm-kwargs"),
        ([image_part(url_of(encoded(picture(1, 224, 224)))), text_part("x = 1\n" * 200)], {}, "256"),
        ([{"type": "video_url", "video_url": {"url": "data:video/mp4;base64,AAAA"}}], {}, "video"),
    ],
    ids=lambda value: None if isinstance(value, (list, dict)) else value[:12],
)
def test_bad_input_is_http_400_with_a_reason(content: Parts, extra: dict[str, Any], words: str, client: OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        ask(client, [*content, text_part("x")], **extra)
    assert words in str(caught.value)
    assert len(str(caught.value)) < 3000
    urllib.request.urlopen(str(client.base_url).removesuffix("v1/") + "health", timeout=30)


def test_a_file_that_is_not_there(client: OpenAI, pictures: str) -> None:
    with pytest.raises(openai.APIStatusError) as caught:
        ask(client, [image_part(f"{pictures}/two.png")])
    assert caught.value.status_code < 500, caught.value
    assert len(ask(client, [GOOD]).choices[0].model_extra["token_ids"]) == 12
