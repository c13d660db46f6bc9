"""The verbs in Python."""

import subprocess
import sys
from pathlib import Path

import pytest

import gtl
from gtl.config.names import parse_reference


def test_importing_loads_nothing_heavy_and_the_verbs_are_there() -> None:
    script = """
import sys, gtl
verbs, before = [gtl.train, gtl.generate, gtl.load_recipe], set(sys.modules)
import gtl.train.launch, gtl.generate.command
print(all(map(callable, verbs)), callable(gtl.train), callable(gtl.generate), {"torch", "ray", "diffusers"} & before)
"""
    answer = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert answer.stdout == "True True True set()\n"
    with pytest.raises(AttributeError, match="no attribute 'fly'"):
        _ = gtl.fly


def test_the_verbs_take_plain_values(tmp_path: Path) -> None:
    with pytest.raises(gtl.UserError, match=r"^model.source: .*nowhere"):
        gtl.generate(prompt="a dog", model=str(tmp_path / "nowhere"), out=str(tmp_path / "out"))
    file = tmp_path / "recipe.yaml"
    with pytest.raises(gtl.UserError, match=r"^recipe .*/recipe\.yaml: No such file"):
        gtl.load_recipe(file)
    file.write_text(f"{{model: {{source: {tmp_path}/nowhere}}, data: {{source: {tmp_path}}}}}")
    recipe = gtl.load_recipe(str(file), [f"storage.{place}={tmp_path / place}" for place in ("runs", "registry")])
    with pytest.raises(gtl.UserError, match=r"^model\.source: .*/nowhere: no such folder"):
        gtl.train(recipe, "dog")
    with pytest.raises(gtl.UserError, match=r"^--resume: no unfinished run under .*/runs/dog$"):
        gtl.train(recipe, "dog", resume=True)


@pytest.mark.parametrize("text", ["dog", "dog@prod", "dog@prod:0.5", "dog:2"])
def test_a_reference_reads_as_it_was_written(text: str) -> None:
    assert str(parse_reference(text)) == text
