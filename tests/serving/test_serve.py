"""The endpoint, by OpenAI's own client: adapters mixed, streamed, cancelled, moved; a replica that dies."""

import base64
import io
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
from openai import BadRequestError, NotFoundError, OpenAI, UnprocessableEntityError
from PIL import Image, ImageChops
from prometheus_client.parser import text_string_to_metric_families

from gtl.adapters import Registry
from gtl.adapters.delta import write_delta
from gtl.families import open_family
from gtl.generate import edit_command
from gtl.generate.edit import Edit
from gtl.generate.images import generate
from gtl.generate.request import Request
from tests.endpoint import BASE, replicas_of
from tests.waiting import eventually

PROMPT = "a large red circle on a blue background"
STEPS = 6


@pytest.fixture(scope="module")
def client(endpoint: str) -> OpenAI:
    return OpenAI(base_url=f"{endpoint}/v1", api_key="none", max_retries=0, timeout=120)


def draw(client: OpenAI, model: str, seed: int, steps: int = STEPS, **options: Any) -> Image.Image:
    extra = {"seed": seed, "num_inference_steps": steps, **options.pop("extra", {})}
    answer = client.images.generate(prompt=PROMPT, model=model, extra_body=extra, **options)
    assert answer.data and answer.data[0].b64_json
    return picture_of(answer.data[0].b64_json)


def picture_of(data: str) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(data)))


def alone(shelf: Path, seed: int, *adapters: tuple[str, float], steps: int = STEPS) -> Image.Image:
    registry, family = Registry(shelf), open_family(BASE)
    folders = [(registry.fetch(name), scale) for name, scale in adapters]
    height, width = family.default_size
    request = Request(PROMPT, height, width, seed=seed, steps=steps)
    ((_, image),) = generate(family, [request], folders)
    return image


def same(one: Image.Image, other: Image.Image) -> bool:
    """Up to two of 255 in a channel: sums of batches of other sizes are rounded in another order."""
    return max(high for _, high in ImageChops.difference(one.convert("RGB"), other).getextrema()) <= 2


MODELS: dict[str, list[tuple[str, float]]] = {
    "tiny": [],
    "tiny:dog@prod": [("dog@v1", 1.0)],
    "tiny:dog": [("dog@v2", 1.0)],
    "star": [("star@v1", 1.0)],
    "tiny:words": [("words@v1", 1.0)],
    "tiny:frozen@v1": [("frozen@v1", 1.0)],
}


def test_a_crowd_of_adapters_is_drawn_as_each_alone(client: OpenAI, shelf: Path) -> None:
    asked = [(model, seed) for seed in (1, 2) for model in MODELS]
    with ThreadPoolExecutor(len(asked)) as pool:
        pictures = list(pool.map(lambda one: draw(client, *one), asked))
    for (model, seed), picture in zip(asked, pictures, strict=True):
        assert same(picture, alone(shelf, seed, *MODELS[model])), model


def test_adapters_add_up_at_their_scales(client: OpenAI, shelf: Path) -> None:
    extra = {"adapters": ["star:0.5", {"name": "words@v1", "scale": -0.3}]}
    picture = draw(client, "tiny:dog@v1", 5, extra=extra)
    assert same(picture, alone(shelf, 5, ("dog@v1", 1.0), ("star@v1", 0.5), ("words@v1", -0.3)))


def test_several_pictures_have_following_seeds(client: OpenAI, shelf: Path) -> None:
    answer = client.images.generate(
        prompt=PROMPT, n=3, size="64x64", extra_body={"seed": 7, "num_inference_steps": STEPS}
    )
    assert answer.data and (answer.size, answer.output_format, answer.model_extra) == (
        "64x64", "png", {"seed": 7, "model": "tiny"},
    )  # fmt: skip
    for i, one in enumerate(answer.data):
        assert one.b64_json and same(picture_of(one.b64_json), alone(shelf, 7 + i))


def test_a_picture_says_what_drew_it(client: OpenAI) -> None:
    import json

    told = json.loads(draw(client, "tiny:dog@prod", 3).info["gtl"])
    assert told.pop("request") and told.pop("gtl")
    assert told == {
        "prompt": PROMPT, "negative_prompt": "", "seed": 3, "steps": STEPS, "guidance": 7.5, "height": 64, "width": 64,
        "adapters": ["dog@v1"], "model": BASE,
    }  # fmt: skip


@pytest.mark.parametrize(("form", "kind"), [("webp", "WEBP"), ("jpeg", "JPEG")])
def test_other_formats(client: OpenAI, form: Any, kind: str) -> None:
    assert draw(client, "tiny", 3, output_format=form, output_compression=80).format == kind


def test_a_stream_shows_the_picture_on_its_way(client: OpenAI, shelf: Path) -> None:
    extra = {"seed": 4, "num_inference_steps": 8}
    events = list(client.images.generate(prompt=PROMPT, stream=True, partial_images=2, extra_body=extra))
    assert [event.type for event in events] == [*["image_generation.partial_image"] * 2, "image_generation.completed"]
    assert [getattr(event, "partial_image_index", None) for event in events] == [0, 1, None]
    final = alone(shelf, 4, steps=8)
    assert same(picture_of(events[-1].b64_json), final)
    away = [
        sum(i * n for i, n in enumerate(ImageChops.difference(picture_of(e.b64_json), final).convert("L").histogram()))
        for e in events
    ]
    assert away[0] > away[1] > away[2]


def test_an_edit_begins_at_the_picture_that_is_sent(client: OpenAI, shelf: Path) -> None:
    """Transparent pixels of the mask are drawn anew, the others are the picture's own."""
    first, mask = alone(shelf, 2), Image.new("RGBA", (64, 64), (0, 0, 0, 255))
    mask.paste((0, 0, 0, 0), (32, 0, 64, 64))
    fields: dict[str, Any] = {"prompt": PROMPT, "model": "tiny:dog@prod"}
    extra = {"seed": 8, "num_inference_steps": 8, "strength": 0.9}
    answer = client.images.edit(image=png(first), mask=png(mask), extra_body=extra, **fields)
    assert answer.data and answer.data[0].b64_json
    edited = picture_of(answer.data[0].b64_json)
    left, right = (0, 0, 32, 64), (32, 0, 64, 64)
    assert edited.crop(left).tobytes() == first.crop(left).tobytes()
    assert edited.crop(right).tobytes() != first.crop(right).tobytes()
    events = list(client.images.edit(image=png(first), stream=True, partial_images=1, extra_body=extra, **fields))
    assert [event.type for event in events] == ["image_edit.partial_image", "image_edit.completed"]


def test_an_edit_by_inversion_in_the_colours_of_another_picture(
    endpoint: str, shelf: Path, tmp_path: Path
) -> None:  # fmt: skip
    """As `gtl edit` draws it; what cannot be inverted names the field."""
    first, green = alone(shelf, 2), Image.new("RGB", (3, 3), "green")
    fields = {"prompt": PROMPT, "seed": "8", "num_inference_steps": "6", "guidance_scale": "3", "invert": "a cat"}

    def ask(**more: bytes) -> httpx.Response:
        return httpx.post(f"{endpoint}/v1/images/edits", data=fields, files={"image": png(first), **more}, timeout=60)

    drawn = picture_of(ask(colors_of=png(green)).json()["data"][0]["b64_json"])
    first.save(tmp_path / "first.png")
    green.save(tmp_path / "green.png")
    (file,) = edit_command.run(
        tmp_path / "first.png", out=tmp_path, prompt=PROMPT, model=BASE, seed=8, steps=6, guidance=3.0,
        invert="a cat", colors_of=tmp_path / "green.png",
    )  # fmt: skip
    assert same(drawn, Image.open(file))
    mask = Image.new("L", first.size, 255)
    error = ask(mask=png(mask)).json()["error"]
    assert (error["param"], error["code"]) == ("invert", "invalid_value")
    assert error["message"].startswith("invert: keeps by itself what is not said to change")
    fields["n"] = "2"
    error = ask().json()["error"]
    assert error["message"] == "n: 2: should be 1 with invert, which draws no noise: all would be one picture"


def png(image: Image.Image) -> bytes:
    sink = io.BytesIO()
    image.save(sink, "PNG")
    return sink.getvalue()


def test_whoever_leaves_is_drawn_no_further(client: OpenAI, endpoint: str) -> None:
    with httpx.stream("POST", f"{endpoint}/v1/images/generations", timeout=60, json={
        "prompt": PROMPT, "stream": True, "partial_images": 3, "num_inference_steps": 200, "seed": 1,
    }) as response:  # fmt: skip
        assert next(response.iter_lines()) == "event: image_generation.partial_image"
    assert eventually(lambda: load_of() == (0, 0))


def load_of() -> tuple[int, int]:
    """Waiting and running, as the generator says."""
    from ray import serve

    status = serve.get_deployment_handle("Generator:tiny", "gtl").status.remote().result()
    return status["waiting"], status["running"]


def test_an_alias_that_moves_is_followed(client: OpenAI, endpoint: str, shelf: Path) -> None:
    registry = Registry(shelf)
    try:
        registry.promote("dog@v2", "prod")
        assert same(draw(client, "tiny:dog@prod", 9), alone(shelf, 9, ("dog@v1", 1.0)))
        assert httpx.post(f"{endpoint}/v1/registry/refresh").json() == {"models": len(client.models.list().data)}
        assert same(draw(client, "tiny:dog@prod", 9), alone(shelf, 9, ("dog@v2", 1.0)))
    finally:
        registry.promote("dog@v1", "prod")
        httpx.post(f"{endpoint}/v1/registry/refresh")


def test_models_say_what_there_is(client: OpenAI, endpoint: str) -> None:
    models = {model.id: model.model_extra["gtl"] for model in client.models.list() if model.model_extra}
    assert sorted(models) == [
        "tiny", "tiny:dog@prod", "tiny:dog@v1", "tiny:dog@v2", "tiny:frozen@v1", "tiny:star@v1", "tiny:words@v1",
    ]  # fmt: skip
    assert (models["tiny"]["default_size"], models["tiny"]["max_pixels"]) == ("64x64", 128 * 128)
    assert {name: one["shares_batch"] for name, one in models.items() if not one["shares_batch"]} == {
        "tiny:frozen@v1": False
    }
    assert client.models.retrieve("tiny:dog").model_extra["gtl"]["version"] == "v2"  # type: ignore[index]
    assert httpx.get(f"{endpoint}/v1/adapters/dog", params={"version": "prod"}).json()["version"] == "v1"
    with pytest.raises(NotFoundError) as caught:
        client.models.retrieve("tiny:cat")
    assert caught.value.code == "model_not_found"
    for path in ("tiny:", "tiny%3A", "%0A", "%20", "tiny@", "tiny:dog@", "dog@"):
        answer = httpx.get(f"{endpoint}/v1/models/{path}")
        assert (answer.status_code, answer.json()["error"]["code"]) == (404, "model_not_found"), path


def test_an_adapter_that_was_removed_is_not_found(client: OpenAI, endpoint: str, shelf: Path) -> None:
    registry = Registry(shelf)
    registry.publish("gone", "v1", registry.fetch("star@v1"), registry.show("star@v1").model_copy(update={
        "name": "gone"}))  # fmt: skip
    httpx.post(f"{endpoint}/v1/registry/refresh")
    registry.remove("gone@v1")
    try:
        with pytest.raises(NotFoundError) as caught:
            draw(client, "tiny:gone@v1", 9)
        assert caught.value.code == "model_not_found"
    finally:
        httpx.post(f"{endpoint}/v1/registry/refresh")


def test_a_codec_of_an_adapter_draws_what_it_draws_alone(client: OpenAI, endpoint: str, shelf: Path) -> None:
    """Also what begins at an image, which it encodes."""
    registry, family = Registry(shelf), open_family(BASE)
    moved = {f"vae.{name}": value * 1.1 for name, value in family.load("vae").named_parameters() if value.ndim > 1}
    with tempfile.TemporaryDirectory() as place:
        write_delta(moved, Path(place))
        card = registry.show("frozen@v1").model_copy(update={"name": "codec"})
        registry.publish("codec", "v1", Path(place), card)
    httpx.post(f"{endpoint}/v1/registry/refresh")
    try:
        drawn = draw(client, "tiny:codec@v1", 9)
        assert same(drawn, alone(shelf, 9, ("codec@v1", 1.0))) and not same(drawn, alone(shelf, 9))
        fields: dict[str, Any] = {"prompt": PROMPT, "model": "tiny:codec@v1", "image": png(drawn)}
        extra = {"seed": 9, "num_inference_steps": STEPS}
        (edited,) = client.images.edit(extra_body=extra, **fields).data or ()
        request = Request(PROMPT, 64, 64, seed=9, steps=STEPS)
        folder = registry.fetch("codec@v1")
        ((_, expected),) = generate(family, [request], [(folder, 1.0)], edit=Edit(drawn.convert("RGB")))
        assert same(picture_of(str(edited.b64_json)), expected)
    finally:
        registry.remove("codec@v1")
        httpx.post(f"{endpoint}/v1/registry/refresh")


def test_a_damaged_card_keeps_nothing_else_from_being_served(client: OpenAI, endpoint: str, shelf: Path) -> None:
    before = [model.id for model in client.models.list()]
    (shelf / "broken" / "v1").mkdir(parents=True)
    try:
        (shelf / "broken" / "v1" / "adapter.json").write_text("{")
        assert httpx.post(f"{endpoint}/v1/registry/refresh").json() == {"models": len(before)}
    finally:
        shutil.rmtree(shelf / "broken")
    assert [model.id for model in client.models.list()] == before


@pytest.mark.parametrize("mask", [Image.new("L", (64, 64), 55), Image.new("RGBA", (64, 64), (0, 0, 0, 200))])
def test_a_mask_that_marks_nothing_is_a_mistake(client: OpenAI, mask: Image.Image) -> None:
    with pytest.raises(BadRequestError) as caught:
        client.images.edit(prompt=PROMPT, image=as_file(Image.new("RGB", (64, 64))), mask=as_file(mask))
    assert caught.value.param == "mask"


def as_file(image: Image.Image) -> tuple[str, bytes]:
    with io.BytesIO() as file:
        image.save(file, "PNG")
        return "a.png", file.getvalue()


def test_the_same_idempotency_key_draws_the_same(client: OpenAI) -> None:
    def ask(key: str) -> str:
        answer = client.images.generate(
            prompt=PROMPT, extra_body={"num_inference_steps": 2}, extra_headers={"Idempotency-Key": key}
        )
        assert answer.data and answer.data[0].b64_json and answer.model_extra
        return str(answer.model_extra["seed"])

    assert ask("one") == ask("one") != ask("two")


def test_what_is_sent_twice_with_an_idempotency_key_is_drawn_once(client: OpenAI, endpoint: str) -> None:
    def ask(key: str, steps: int = 20) -> tuple[str, str | None]:
        raw = client.images.with_raw_response.generate(
            prompt=PROMPT, extra_body={"num_inference_steps": steps}, extra_headers={"Idempotency-Key": key}
        )
        (one,) = raw.parse().data or ()
        return str(one.b64_json), raw.headers.get("idempotency-replayed")

    before = pictures_of(endpoint)
    with ThreadPoolExecutor(4) as pool:
        answers = list(pool.map(ask, ["once"] * 4))
    answers.append(ask("once"))
    assert len({data for data, _ in answers}) == 1, "to the bit, with the first one's x-request-id in it"
    assert sorted(str(replayed) for _, replayed in answers) == ["None", *["true"] * 4]
    assert pictures_of(endpoint) == before + 1
    with pytest.raises(UnprocessableEntityError) as caught:
        ask("once", 21)
    assert caught.value.code == "idempotency_key_reused"
    assert ask("twice")[0] != answers[0][0]


def test_an_edit_is_the_same_though_its_form_has_another_boundary(client: OpenAI, endpoint: str) -> None:
    def ask(side: int) -> Any:
        image = png(Image.new("RGB", (side, side), "red"))
        return client.images.edit(
            image=image, prompt=PROMPT, extra_body={"num_inference_steps": 2}, extra_headers={"Idempotency-Key": "edit"}
        )

    before = pictures_of(endpoint)
    assert ask(64) == ask(64)
    assert pictures_of(endpoint) == before + 1
    with pytest.raises(UnprocessableEntityError):
        ask(48)


def test_whoever_leaves_with_an_idempotency_key_finds_the_picture_later(endpoint: str) -> None:
    fields = {"prompt": PROMPT, "num_inference_steps": 60}
    place = f"{endpoint}/v1/images/generations"
    before = pictures_of(endpoint)
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(place, json=fields, headers={"Idempotency-Key": "left"}, timeout=0.3)
    answer = httpx.post(place, json=fields, headers={"Idempotency-Key": "left"}, timeout=120)
    assert (answer.status_code, answer.headers["idempotency-replayed"]) == (200, "true")
    assert pictures_of(endpoint) == before + 1


def pictures_of(endpoint: str) -> float:
    """Drawn by the base alone."""
    return numbers_of(endpoint).get('gtl_pictures_total{adapter="",base="tiny"}', 0)


def test_a_replica_that_dies_costs_time_and_no_picture(client: OpenAI, shelf: Path) -> None:
    import ray

    def kill() -> None:
        assert eventually(lambda: load_of()[1] > 0)
        (generator,) = replicas_of("Generator")
        ray.kill(generator)

    with ThreadPoolExecutor(3) as pool:
        drawn = [pool.submit(draw, client, model, 11, 60) for model in ("tiny", "tiny:dog@prod")]
        kill()
        pictures = [one.result() for one in drawn]
    assert same(pictures[0], alone(shelf, 11, steps=60))
    assert same(pictures[1], alone(shelf, 11, ("dog@v1", 1.0), steps=60))


def test_an_ingress_tells_how_it_is(endpoint: str, client: OpenAI) -> None:
    assert httpx.get(f"{endpoint}/healthz").json() == {"status": "ok"}
    for path in ("/healthz", "/readyz", "/"):  # as load balancers ask
        there, whole = httpx.head(f"{endpoint}{path}"), httpx.get(f"{endpoint}{path}")
        assert (there.status_code, there.content) == (200, b""), path
        assert there.headers["content-length"] == str(len(whole.content)), path
    assert httpx.head(f"{endpoint}/v1/models").status_code == 405
    ready = httpx.get(f"{endpoint}/readyz")
    assert (ready.status_code, ready.json()) == (200, {"status": "ready", "missing": []})
    before = numbers_of(endpoint)
    draw(client, "tiny:dog@prod", 1)
    after = numbers_of(endpoint)
    for name in (
        'gtl_pictures_total{adapter="dog@v1",base="tiny"}', 'gtl_step_seconds_count{base="tiny"}',
        'gtl_requests_total{path="/v1/images/generations",status="200"}',
    ):  # fmt: skip
        assert after[name] == before.get(name, 0) + 1, name
    assert after["gtl_pictures_running"] == after["gtl_pictures_waiting"] == 0


def numbers_of(endpoint: str) -> dict[str, float]:
    """Of all ingresses together, by the name of a series without its ingress."""
    found: dict[str, float] = {}
    for metric in text_string_to_metric_families(httpx.get(f"{endpoint}/metrics", timeout=30).text):
        for name, labels, value, *_ in metric.samples:
            assert labels.pop("ingress")
            told = ",".join(f'{key}="{labels[key]}"' for key in sorted(labels))
            series = f"{name}{{{told}}}" if told else name
            found[series] = found.get(series, 0) + value
    return found


def test_an_answer_has_one_request_id(endpoint: str) -> None:
    """Ray Serve's proxy gives each request one and puts it onto the answer."""
    place, fields = f"{endpoint}/v1/images/generations", {"prompt": PROMPT, "num_inference_steps": 1}
    for more, status in (({}, 200), ({"stream": True}, 200), ({"n": 0}, 400)):
        for own in ({}, {"x-request-id": "mine-1"}):
            answer = httpx.post(place, json={**fields, **more}, headers=own, timeout=60)
            (told,) = answer.headers.get_list("x-request-id")
            assert answer.status_code == status and told == own.get("x-request-id", told)


def test_no_process_that_answers_http_has_torch(endpoint: str) -> None:
    code = "import sys, serve.ingress; print([name for name in ('torch', 'diffusers', 'peft') if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


WRONG: dict[str, tuple[dict[str, Any], int, str]] = {
    "steps": ({"num_inference_steps": 0}, 400, "num_inference_steps"),
    "size": ({"size": "63x64"}, 400, "size"),
    "pixels": ({"size": "144x128"}, 400, "size"),
    "prompt": ({"prompt": ""}, 400, "prompt"),
    "model": ({"model": "tiny:cat"}, 404, "model"),
    "empty alias": ({"model": "tiny:dog@"}, 404, "model"),
    "adapter": ({"adapters": ["cat"]}, 404, "adapters"),
    "twice": ({"model": "tiny:dog@v1", "adapters": ["dog@prod"]}, 400, "adapters"),
    "unknown": ({"lora": "/etc/passwd"}, 400, "lora"),
    "url": ({"response_format": "url"}, 400, "response_format"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_is_wrong_is_said_in_openai_s_shape(endpoint: str, case: str) -> None:
    fields, status, param = WRONG[case]
    answer = httpx.post(f"{endpoint}/v1/images/generations", json={"prompt": PROMPT, **fields}, timeout=60)
    error = answer.json()["error"]
    assert (answer.status_code, error["param"]) == (status, param)
    assert sorted(error) == ["code", "message", "param", "type"] and answer.headers["x-request-id"]
