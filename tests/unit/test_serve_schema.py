import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from openai.types import (
    ImageEditCompletedEvent,
    ImageEditPartialImageEvent,
    ImageGenCompletedEvent,
    ImageGenPartialImageEvent,
)
from openai.types import ImagesResponse as TheirResponse
from openai.types import Model as TheirModel
from openai.types.image_edit_params import ImageEditParamsBase
from openai.types.image_generate_params import ImageGenerateParamsBase
from pydantic import ValidationError

from gtl.config.names import Reference
from serve.body import read_fields, read_json
from serve.errors import ApiError
from serve.schema import (
    Completed,
    Drawing,
    Edit,
    Generation,
    ImagesResponse,
    Limits,
    Model,
    ModelList,
    Origin,
    PartialImage,
    Picture,
    check,
    parse_edit,
    parse_generation,
    sse,
    to_json,
)

TOP = 2**63 - 1
NOT_OURS = {"complexity", "frame_count", "frame_duration_ms", "svg", "markup"}
"""Fields of OpenAI's for animations, vector graphics and marked-up pictures."""


def generation(limits: Limits = Limits(), urls: bool = False, **fields: Any) -> Generation:  # noqa: B008 - frozen
    return parse_generation(json.dumps({"prompt": "a dog", **fields}).encode(), limits, urls=urls)


def edit(*fields: tuple[str, str]) -> Edit:
    return parse_edit([("prompt", "a dog"), *fields], Limits(), urls=False)


def refusal(**fields: Any) -> ApiError:
    with pytest.raises(ApiError) as caught:
        generation(**fields)
    assert caught.value.status_code == 400
    return caught.value


def test_a_prompt_is_enough() -> None:
    asked = generation()
    assert asked.model_dump(exclude_defaults=True) == {"prompt": "a dog"}
    assert (asked.n, asked.pixels, asked.adapters, asked.seed, asked.compression) == (1, None, (), None, 100)


def test_every_field_of_openais_client_is_known() -> None:
    for ours, theirs in ((Generation, ImageGenerateParamsBase), (Edit, ImageEditParamsBase)):
        missing = set(theirs.__annotations__) - set(ours.model_fields) - NOT_OURS
        assert missing == ({"image", "mask"} if ours is Edit else set())
        assert set(theirs.__annotations__) >= set(ours.model_fields) - {
            "stream", "negative_prompt", "seed", "num_inference_steps", "guidance_scale", "adapters", "strength",
            "image_guidance_scale", "invert",
        }  # fmt: skip


def test_what_openais_clients_send_is_accepted() -> None:
    asked = generation(
        model="sd:dog@prod", n=2, size="1024x1536", quality="hd", style="vivid", background="opaque", moderation="low",
        user="u1", safety_identifier="s1", response_format="b64_json", output_format="webp", output_compression=70,
        stream=False, partial_images=0,
    )  # fmt: skip
    assert (asked.model, asked.pixels, asked.compression) == ("sd:dog@prod", (1024, 1536), 70)


def test_null_is_as_if_left_out() -> None:
    nothing: dict[str, Any] = dict.fromkeys(set(Generation.model_fields) - {"prompt"})
    assert generation(**nothing) == generation()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"prompt": ""}, "prompt: '': should not be empty"),
        ({"prompt": 3}, "prompt: 3: should be text"),
        ({"prompt": None}, "prompt: missing"),
        ({"promt": "x"}, "promt: unknown field; did you mean prompt?"),
        ({"model": ""}, "model: '': should not be empty"),
        ({"n": 0}, "n: 0: should be greater than or equal to 1"),
        ({"n": 11}, "n: 11: should be less than or equal to 10"),
        ({"n": "2"}, "n: '2': should be a whole number"),
        ({"n": 1.5}, "n: 1.5: should be a whole number"),
        ({"n": True}, "n: True: should not be true or false"),
        ({"size": "512"}, "size: '512': should be auto or WIDTHxHEIGHT in pixels, for example 512x768"),
        ({"size": "0x512"}, "size: '0x512': should be auto or WIDTHxHEIGHT in pixels, for example 512x768"),
        ({"size": "512x512\n"}, "size: '512x512\\n': should be auto or WIDTHxHEIGHT in pixels, for example 512x768"),
        ({"size": "9" * 99}, f"size: '{'9' * 79}...: should be auto or WIDTHxHEIGHT in pixels, for example 512x768"),
        ({"output_format": "gif"}, "output_format: 'gif': should be 'png', 'webp' or 'jpeg'"),
        ({"background": "transparent"}, "background: 'transparent': should be 'auto' or 'opaque'"),
        ({"output_compression": 101, "output_format": "jpeg"}, "output_compression: 101: should be less than or equal"),
        ({"output_compression": 50}, "output_compression: 50: should be left out for png; it is for webp and jpeg"),
        ({"stream": 1}, "stream: 1: should be true or false"),
        ({"stream": True, "n": 2}, "stream: true: should be left out with n=2; only one picture can be streamed"),
        ({"partial_images": 1}, "partial_images: 1: should be 0 without stream=true"),
        ({"stream": True, "partial_images": 4}, "partial_images: 4: should be less than or equal to 3"),
        ({"stream": True, "response_format": "url"}, "response_format: 'url': should be b64_json with stream=true"),
        ({"response_format": "url"}, "response_format: 'url': should be b64_json; this server keeps no pictures"),
        ({"seed": -1}, "seed: -1: should be greater than or equal to 0"),
        ({"seed": 2**63}, "seed: 9223372036854775808: should be less than or equal to 9223372036854775807"),
        ({"seed": TOP, "n": 2}, f"seed: {TOP}: should leave room for n=2: the last picture has seed + n - 1"),
        ({"num_inference_steps": 201}, "num_inference_steps: 201: should be at most 200"),
        ({"num_inference_steps": 0}, "num_inference_steps: 0: should be greater than or equal to 1"),
        ({"guidance_scale": -0.1}, "guidance_scale: -0.1: should be greater than or equal to 0"),
        ({"guidance_scale": 1e300}, "guidance_scale: 1e+300: should be less than or equal to 100"),
        ({"adapters": "dog"}, "adapters: 'dog': should be a list"),
        ({"adapters": [7]}, "adapters.0: 7: should be an object with fields"),
        ({"adapters": [{}]}, "adapters.0.name: missing"),
        ({"adapters": ["Dog"]}, "adapters.0.name: 'Dog': should be NAME, NAME@VERSION or NAME@ALIAS, of a-z"),
        ({"adapters": ["../../etc"]}, "adapters.0.name: '../../etc': should be NAME"),
        ({"adapters": ["s3://x"]}, "adapters.0: 's3://x': should be NAME"),
        ({"adapters": ["dog", {"name": "dog:2"}]}, "adapters.1.name: 'dog:2': should be NAME, NAME@VERSION or NAME@A"),
        ({"adapters": [{"name": "dog", "scale": 10.5}]}, "adapters.0.scale: 10.5: should be less than or equal to 10"),
        ({"adapters": ["dog:-11"]}, "adapters.0.scale: -11.0: should be greater than or equal to -10"),
        ({"adapters": [{"name": "dog", "path": "/x"}]}, "adapters.0.path: unknown field"),
        ({"adapters": ["dog"] * 9}, "adapters: 9 adapters: should be at most 8"),
        ({"prompt": "x" * 4001}, "prompt: 4001 characters: should be at most 4000"),
        ({"negative_prompt": "x" * 4001}, "negative_prompt: 4001 characters: should be at most 4000"),
        ({"user": "x" * 513}, f"user: '{'x' * 79}...: string should have at most 512 characters"),
    ],
)
def test_a_wrong_field_is_named_with_its_value_and_what_is_allowed(fields: dict[str, Any], message: str) -> None:
    told = refusal(**fields)
    assert told.message.startswith(message)
    assert told.param == message.split(":")[0]


def test_limits_narrow_what_is_allowed() -> None:
    limits = Limits(max_pixels=100, max_steps=5, max_n=2, max_prompt=5, max_adapters=1)
    fields: dict[str, Any]
    for fields in ({"size": "10x10"}, {"num_inference_steps": 5}, {"n": 2}, {"adapters": ["a"]}):
        generation(limits, **fields)
    for fields, message in (
        ({"size": "10x11"}, "size: '10x11' has 110 pixels: should be at most 100"),
        ({"num_inference_steps": 6}, "num_inference_steps: 6: should be at most 5"),
        ({"n": 3}, "n: 3: should be at most 2"),
        ({"prompt": "a hare"}, "prompt: 6 characters: should be at most 5"),
        ({"adapters": ["a", "b"]}, "adapters: 2 adapters: should be at most 1"),
    ):
        with pytest.raises(ApiError) as caught:
            generation(limits, **fields)
        assert caught.value.message == message
    with pytest.raises(ValidationError, match="max_n"):
        Limits(max_n=11)


def test_a_url_is_answered_where_there_is_a_bucket() -> None:
    assert generation(urls=True, response_format="url").response_format == "url"


def test_seeds_reach_the_last_one() -> None:
    assert generation(seed=TOP).seed == TOP
    assert generation(seed=TOP - 9, n=10).seed == TOP - 9


def test_adapters_are_names_or_objects() -> None:
    asked = generation(adapters=["dog", "cat@prod:0.5", {"name": "hat@20260101-000000-000-abcdef", "scale": -1}])
    assert [adapter.reference for adapter in asked.adapters] == [
        Reference("dog", None, 1.0), Reference("cat", "prod", 0.5), Reference("hat", "20260101-000000-000-abcdef", -1),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b"", "the body is not valid JSON: Expecting value at character 0"),
        (b'{"prompt": "x"', "the body is not valid JSON: Expecting ',' delimiter at character 14"),
        (b'{"prompt": "x", "guidance_scale": NaN}', "the body is not valid JSON: NaN is no number"),
        (b'{"prompt": "x", "guidance_scale": -Infinity}', "the body is not valid JSON: -Infinity is no number"),
        (b'{"prompt": "x", "guidance_scale": 1e999}', "guidance_scale: inf: should be"),
        (b'{"prompt": "x", "seed": ' + b"9" * 5000 + b"}", "the body is not valid JSON: a number has too many digits"),
        (b'{"prompt": "x", "prompt": "y"}', "prompt: given twice"),
        (b'{"prompt": "\xff"}', "the body is not UTF-8 (byte 12)"),
        (b'{"prompt": "\\ud800"}', "prompt: '\\ud800': "),
        (b"[" * 100_000, "the body is not valid JSON: nested too deeply"),
        (b"[1]", "the body should be a JSON object with fields"),
        (b'"prompt"', "the body should be a JSON object with fields"),
        (b"null", "prompt: missing"),
        (
            json.dumps({"prompt": "x", **dict.fromkeys(map(str, range(100)))}).encode(),
            "101 fields in one object: should",
        ),
        (
            json.dumps({"prompt": "x", "adapters": [dict.fromkeys(map(str, range(101)))]}).encode(),
            "101 fields in one o",
        ),
        (b'{"\\ud800": 1, "prompt": "x"}', "should be a valid string, unable to parse"),
        (b'{"' + b"x" * 9999 + b'": 1, "prompt": "x"}', f"{'x' * 80}: unknown field; fields: prompt, model, n"),
    ],
)
def test_a_broken_body_is_refused(body: bytes, message: str) -> None:
    with pytest.raises(ApiError) as caught:
        parse_generation(body, Limits(), urls=False)
    assert caught.value.status_code == 400
    assert caught.value.message.startswith(message)
    json.dumps(caught.value.body(), ensure_ascii=False).encode()  # can be sent
    assert len(caught.value.message) < 600


def test_the_first_mistake_of_many_is_enough() -> None:
    """A list of 300000 of them kept the ingress busy for seconds."""
    with pytest.raises(ValidationError) as caught:
        Generation.model_validate({"prompt": "x", "adapters": [0] * 1000})
    assert caught.value.error_count() == 1


def test_a_text_field_that_is_json_is_no_longer_than_json_may_be() -> None:
    with pytest.raises(ApiError) as caught:
        edit(("adapters", "[" + "0," * 2**19 + "0]"))
    assert (caught.value.status_code, caught.value.param) == (413, "adapters")


SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text()
VALUES = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3), max_leaves=6
)
NAMES = st.sampled_from(sorted(Edit.model_fields)) | st.text()
NEAR = {
    "n": st.integers(-1, 12), "size": st.from_regex(r"[0-9a]{0,5}x?[0-9]{0,5}"), "seed": st.integers(-1, 2**63),
    "adapters": st.lists(st.fixed_dictionaries({}, optional={"name": st.text(), "scale": st.floats()}) | st.text()),
    "stream": st.booleans(), "partial_images": st.integers(-1, 4), "prompt": st.text(),
}  # fmt: skip


@settings(deadline=None, max_examples=300)
@given(st.dictionaries(NAMES, VALUES, max_size=4), st.fixed_dictionaries({}, optional=NEAR), st.booleans())
def test_any_json_is_a_request_or_an_error_that_can_be_sent(
    odd: dict[str, Any], near: dict[str, Any], urls: bool
) -> None:
    body = json.dumps({"prompt": "x", **near, **odd}).encode()
    try:
        asked = parse_generation(body, Limits(), urls=urls)
    except ApiError as error:
        assert error.status_code == 400
        assert "\n" not in error.message
        json.dumps(error.body(), ensure_ascii=False).encode()
    else:
        assert parse_generation(asked.model_dump_json().encode(), Limits(), urls=urls) == asked
        assert 0 <= (asked.seed or 0) + asked.n - 1 <= TOP
        assert asked.n == 1 or not asked.stream
        assert asked.prompt.encode()


@settings(deadline=None, max_examples=200)
@given(st.lists(st.tuples(NAMES | st.from_regex(r"adapters\[\](\[name\]|\[scale\])?", fullmatch=True), st.text())))
def test_any_form_is_a_request_or_an_error_that_can_be_sent(fields: list[tuple[str, str]]) -> None:
    try:
        parse_edit(fields, Limits(), urls=False)
    except ApiError as error:
        assert error.status_code == 400
        json.dumps(error.body(), ensure_ascii=False).encode()


def test_a_form_says_the_same_as_json() -> None:
    asked = edit(
        ("n", "2"), ("seed", "7"), ("strength", "0.25"), ("stream", "false"), ("size", "64x32"), ("model", "sd"),
        ("adapters", "dog@prod:0.5"), ("guidance_scale", "0"), ("negative_prompt", ""), ("output_format", "jpeg"),
    )  # fmt: skip
    assert asked.model_dump(exclude_defaults=True) == {
        "prompt": "a dog", "n": 2, "seed": 7, "strength": 0.25, "size": "64x32", "model": "sd", "output_format": "jpeg",
        "adapters": ({"name": "dog@prod", "scale": 0.5},), "guidance_scale": 0.0,
    }  # fmt: skip
    assert edit(("stream", "true"), ("partial_images", "3")).partial_images == 3
    assert edit().strength == 0.8


@pytest.mark.parametrize(
    "fields",
    [
        [("adapters", '["dog:0.5", {"name": "cat", "scale": 2}]')],
        [("adapters[]", "dog:0.5"), ("adapters[]", "cat:2")],
        # Lists of objects as OpenAI's client sends them: first all names, then all scales.
        [("adapters[][name]", "dog"), ("adapters[][name]", "cat"), ("adapters[][scale]", "0.5"),
         ("adapters[][scale]", "2")],
        [("adapters[]", "dog:0.5"), ("adapters[][name]", "cat"), ("adapters[][scale]", "2")],
    ],
)  # fmt: skip
def test_a_form_may_write_adapters_in_several_ways(fields: list[tuple[str, str]]) -> None:
    assert [(a.name, a.scale) for a in edit(*fields).adapters] == [("dog", 0.5), ("cat", 2)]


def test_a_form_with_one_adapter_as_an_object() -> None:
    assert [(a.name, a.scale) for a in edit(("adapters", '{"name": "dog"}')).adapters] == [("dog", 1)]
    assert [(a.name, a.scale) for a in edit(("adapters[][name]", "dog")).adapters] == [("dog", 1)]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ([("prompt", "y")], "prompt: given twice"),
        ([("seed", "x")], "seed: 'x': should be a whole number"),
        ([("strength", "1.5")], "strength: '1.5': should be less than or equal to 1"),
        ([("strength", "nan")], "strength: 'nan': should be"),
        ([("style", "vivid")], "style: unknown field"),
        ([("n[]", "1")], "n[]: unknown field"),
        ([("adapters", "[1")], "adapters: not valid JSON: Expecting ',' delimiter at character 2"),
        ([("adapters", '[{"name": "a", "scale": NaN}]')], "adapters: not valid JSON: NaN is no number"),
        ([("adapters", "[" * 100_000)], "adapters: not valid JSON: nested too deeply"),
        ([("adapters", "a"), ("adapters[]", "b")], "adapters: given twice"),
        ([("adapters", "[" + "0," * 200 + "0]")], "adapters.0: 0: should be an object with fields"),
        (
            [("adapters[][name]", "a"), ("adapters[][name]", "b"), ("adapters[][scale]", "1")],
            "adapters: 1 scales for 2",
        ),
    ],
)
def test_a_wrong_form_is_refused(fields: list[tuple[str, str]], message: str) -> None:
    with pytest.raises(ApiError) as caught:
        edit(*fields)
    assert (caught.value.status_code, caught.value.message[: len(message)]) == (400, message)


def test_the_schema_of_a_request_says_what_is_allowed() -> None:
    schema = Generation.model_json_schema()
    assert schema["additionalProperties"] is False
    assert schema["properties"]["size"]["pattern"] == "^(auto|([1-9][0-9]{0,4})x([1-9][0-9]{0,4}))$"
    kinds = [option["type"] for option in schema["$defs"]["Adapter"]["anyOf"]]
    assert kinds == ["string", "object"]
    assert all("description" in field for name, field in schema["properties"].items() if name not in NO_WORDS)


NO_WORDS = {"output_format", "user", "safety_identifier"}


def test_requests_are_frozen() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        generation().n = 2  # type: ignore[misc, unused-ignore]


def test_check_returns_the_request_itself() -> None:
    asked = Drawing(prompt="x")
    assert check(asked, Limits(), urls=False) is asked


def test_an_answer_is_what_openais_client_reads() -> None:
    ours = ImagesResponse(
        data=(Picture(b64_json="QQ==", seed=7), Picture(url="https://x/y", seed=8)),
        output_format="webp", size="64x32", seed=7, model="sd:dog@1",
    )  # fmt: skip
    values = json.loads(to_json(ours))
    theirs = TheirResponse.model_validate(values, strict=True)
    assert theirs.data is not None
    assert [(p.b64_json, p.url) for p in theirs.data] == [("QQ==", None), (None, "https://x/y")]
    assert (theirs.size, theirs.output_format, theirs.background) == ("64x32", "webp", "opaque")
    assert theirs.model_extra == {"seed": 7, "model": "sd:dog@1"}
    assert abs(theirs.created - ours.created) == 0
    assert "url" not in values["data"][0]


def test_events_are_what_openais_client_reads() -> None:
    for verb, partial, completed in (
        ("image_generation", ImageGenPartialImageEvent, ImageGenCompletedEvent),
        ("image_edit", ImageEditPartialImageEvent, ImageEditCompletedEvent),
    ):
        fields: dict[str, Any] = {"b64_json": "QQ==", "size": "64x32", "output_format": "png"}
        first = PartialImage(type=f"{verb}.partial_image", partial_image_index=2, **fields)  # type: ignore[arg-type]
        last = Completed(type=f"{verb}.completed", seed=7, model="sd", **fields)  # type: ignore[arg-type]
        for event, theirs in ((first, partial), (last, completed)):
            name, data, *rest = sse(event).split(b"\n")
            assert (name, rest) == (b"event: " + event.type.encode(), [b"", b""])
            parsed = theirs.model_validate_json(data.removeprefix(b"data: "), strict=True)
            assert parsed.b64_json == "QQ=="
            assert parsed.type == event.type


def test_models_are_what_openais_client_reads() -> None:
    about = Origin(kind="adapter", base="sd", adapter="dog", version="1", aliases=("prod",))
    values = json.loads(to_json(ModelList(data=(Model(id="sd:dog@1", created=3, gtl=about),))))
    assert values["object"] == "list"
    theirs = TheirModel.model_validate(values["data"][0], strict=True)
    assert (theirs.id, theirs.created, theirs.object, theirs.owned_by) == ("sd:dog@1", 3, "model", "gtl")
    assert values["data"][0]["gtl"] == {
        "kind": "adapter", "base": "sd", "adapter": "dog", "version": "1", "aliases": ["prod"], "shares_batch": True,
    }  # fmt: skip


def test_json_and_fields_are_read_as_they_are() -> None:
    assert read_json(b'\xef\xbb\xbf{"a": [1, 2.5, null]}') == {"a": [1, 2.5, None]}
    assert read_fields([("a", "1"), ("b", "")]) == {"a": "1"}
