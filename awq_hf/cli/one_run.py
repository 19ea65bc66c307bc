"""What `awq-hf quantize` does: check all that can be checked, quantize, export, measure, describe, push."""

from __future__ import annotations

import gc
import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import typer

from awq_hf.cli.card import put
from awq_hf.cli.common import check_device, check_dtype, check_revision, console, say, shared_tokenizer
from awq_hf.cli.push import summary
from awq_hf.cli.steps import Step, command_line, run_steps


class OneRun:
    """given: options of the command line by their names in a recipe, OUT and the recipe itself among them."""

    def __init__(self, given: dict[str, Any], as_json: bool) -> None:
        from awq_hf.config import AwqConfig
        from awq_hf.recipe_file import HERE, OF_RUN, OPTIONS, Run, read_recipe

        file, self.resume = given.pop("recipe", None), given.pop("resume", False)
        read = {} if file is None else read_recipe(file)
        if "out" not in given and "model" in read and "model" in given:  # awq-hf quantize --recipe FILE OUT
            given["out"] = given.pop("model")
        if "model" in given and read.get("model") not in (str(given["model"]), f"{HERE}{Path(str(given['model'])).name}"):
            for about_it in ("revision", "base_model", "license", "trust_remote_code"):  # are of the recipe's model, not of another
                read.pop(about_it, None)
        if read.get("trust_remote_code") and not given.get("trust_remote_code"):
            raise ValueError(f"{file} ran code that comes with {read.get('model')}; read it, and if you trust it, say --trust-remote-code")
        options = {**read, **{name: value for name, value in given.items() if name in OPTIONS}}
        if "out" not in given or options.get("model") is None:
            raise typer.BadParameter(
                "give MODEL and OUT; MODEL may come from a recipe" if file is None else "give MODEL, which is not in the recipe, and OUT"
            )
        if "model" not in given and str(options["model"]).startswith(HERE) and not Path(options["model"]).is_dir():
            raise ValueError(
                f"{file} was made from a directory {options['model']}, which is not here; give it: "
                f"awq-hf quantize --recipe {file} MODEL {given['out']}"
            )
        self.out, self.as_json = Path(given["out"]), as_json
        self.run = Run(**{name: options[name] for name in OF_RUN if name in options})
        self.run = replace(self.run, text=None if self.run.text is None else str(self.run.text))
        self.config = AwqConfig(**{name: value for name, value in options.items() if name not in OF_RUN})
        self.dtype, self.device = check_dtype(self.run.dtype), check_device(self.run.device)
        self.model, self.location = str(self.run.model), {} if self.run.revision is None else {"revision": self.run.revision}
        self.trust: dict[str, Any] = {"trust_remote_code": True} if self.run.trust_remote_code else {}
        self.measured = self.run.measure if self.run.measure is not None else bool(self.run.text or self.run.push)

    def go(self) -> None:
        import awq_hf
        from awq_hf.recipe_file import write_recipe

        self.check()
        options: dict[str, Any] = dict(resume=self.resume, dtype=self.dtype, device_map=self.device, **self.location, **self.trust)
        try:
            model: Any = awq_hf.quantize(self.model, self.config, output_dir=self.out, **options)
        except KeyboardInterrupt:
            if hint := self.how_to_resume() or ("" if self.resume else "nothing was written; --resume keeps finished blocks"):
                typer.echo(f"interrupted; {hint}", err=True)
                raise typer.Exit(130) from None
            raise
        except Exception as error:
            if not isinstance(error, ValueError) and (hint := self.how_to_resume()):  # a refusal would be the same again
                typer.echo(hint, err=True)
            raise
        report = model.awq_report
        del model
        gc.collect()
        base = report.base_model
        measured = True if self.measured and self.run.text is None else self.run.measure  # a repeat pushes nothing, but measures
        write_recipe(self.out, base, self.config, replace(self.run, measure=measured))
        if base["revision"] is not None and not Path(self.model).is_dir():  # what follows is of the same commit, whatever others push
            self.location = {"revision": base["revision"]}
        self.say(report.summary())
        self.say(f"\nWritten to {self.out}; {self.out / 'report.json'} says what happened to every layer.")
        steps = self.steps()
        results = dict(zip(steps, run_steps(list(steps.values()), self.say, f"The model is in {self.out}."), strict=True))
        self.close(report, results)

    def how_to_resume(self) -> str:
        kept = Path(f"{self.out}.progress")
        return f"finished blocks are kept in {kept}; the same command goes on from there" if self.resume and kept.is_dir() else ""

    def check(self) -> None:
        """Everything that can be refused, before the work."""
        from awq_hf.api import check_model
        from awq_hf.exporters.hub_repository import check_not_original, find_repository
        from awq_hf.model_cards.facts import check_hub_id
        from awq_hf.model_cards.licence import check_licence
        from awq_hf.output import check_output
        from awq_hf.targets import parse_targets, places

        check_output(self.out)
        check_revision(self.model, self.run.revision)
        self.targets = parse_targets(self.run.export or ())
        if self.run.measure is False and self.run.text is not None:
            raise ValueError("--no-measure and --text contradict each other: a text is there to measure on; leave one out")
        if self.run.push is None and self.run.private:
            raise ValueError("--private is about the repository of --push; give both, or neither")
        check_hub_id("base_model", self.run.base_model)
        self.run = replace(self.run, license=check_licence(self.run.license))
        if self.run.push is not None:
            found = find_repository(self.run.push, private=self.run.private or None)
            check_not_original(found.repo_id, self.model)
            self.run = replace(self.run, push=found.repo_id)  # with its owner
        kind = check_model(self.model, {**self.location, **self.trust})
        if self.measured and not getattr(kind, "can_generate", lambda: True)():  # an automatic class is for models that write text
            if self.run.text is not None or self.run.measure:
                raise ValueError(f"{self.model} is a {kind.__name__}, which does not predict the next token: it cannot be measured so")
            self.measured = False
            self.say(f"Nothing is measured: a {kind.__name__} does not predict the next token.")
        self.places = places(self.targets, self.model, self.location, self.config, self.out, bool(self.trust))
        if self.measured:
            shared_tokenizer([self.original()], None if self.run.text is None else Path(self.run.text), bool(self.trust))

    def original(self) -> str:
        """The model as `awq-hf eval` takes it."""
        return "@".join([self.model, *self.location.values()])

    def say(self, text: str) -> None:
        if self.as_json:
            typer.echo(text, err=True)
        else:
            say(text)

    def steps(self) -> dict[str, Step]:
        """What comes after saving, by name."""
        found = {str(target): self._export(target, place) for target, place in zip(self.targets, self.places, strict=True)}
        if self.measured:
            dtype = None if self.dtype == "auto" else self.dtype
            again = command_line(
                "eval", self.out, reference=self.original(), text=self.run.text, save=True, dtype=dtype, device=self.run.device,
                **self.trust,
            )  # fmt: skip
            found["measure"] = Step("Measuring", self._measure, again)
        of_card = dict(base_model=self.run.base_model, license=self.run.license)
        again = command_line("card", self.out, repo_id=self.run.push, **of_card)
        found["card"] = Step("Writing the card", self._card, again)
        if self.run.push is not None:
            again = command_line("push", self.out, self.run.push, private=self.run.private, **of_card)
            found["push"] = Step(f"Pushing to {self.run.push}", self._push, again)
        return found

    def _export(self, target: Any, place: Path) -> Step:
        import awq_hf
        from awq_hf.config import AwqConfig
        from awq_hf.exporters.gguf.types import UNSEARCHED
        from awq_hf.to_gguf import to_gguf

        if target.name != "gguf":
            options = {} if target.type is None else {"dtype": target.type}
            again = command_line("export", target.name, self.out, place, **options)
            return Step(f"Exporting to {target}", lambda: awq_hf.export(self.out, target.name, place, **options), again)
        common: dict[str, Any] = dict(progress=not self.as_json)
        if target.type is None:
            again = command_line("export", "gguf", self.out, self.out)
            return Step("Exporting to gguf: the same integers", lambda: to_gguf(self.out, place, **common), again)
        common |= dict(type=target.type, location=self.location)
        of_search: dict[str, Any] = {}
        if target.type not in UNSEARCHED:
            of_search = {name: getattr(self.config, name) for name in ("calibration", "samples", "seq_len", "seed")}
            config = AwqConfig(**of_search, tokenizer=self.config.tokenizer)  # the rest is about integers of another kind
            common |= dict(config=config, device=self.device)
            of_search["device"] = self.device
        again = command_line("export", "gguf", self.model, self.out, type=target.type, **of_search, **self.location)
        return Step(f"Exporting to gguf: {target.type}, from the float weights", lambda: to_gguf(self.model, place, **common), again)

    def _measure(self) -> dict[str, Any]:
        from awq_hf.compat import progress_bar
        from awq_hf.measure import measure

        options: dict[str, Any] = dict(location=self.location, dtype=self.dtype, device_map=self.device, progress=progress_bar)
        return measure(self.out, self.model, self.run.text, **options, **self.trust)

    def _card(self) -> None:
        from awq_hf.model_cards.card import write_card
        from awq_hf.model_cards.facts import gather
        from awq_hf.model_cards.missing import missing

        facts = gather(self.out, self.run.push, self.run.base_model, self.run.license)
        put(write_card(facts), self.out)
        for what, how in missing(facts):
            self.say(f"Not in the card: {what}.\n  {how}")

    def _push(self) -> Any:
        import awq_hf

        assert self.run.push is not None
        of_card: dict[str, Any] = dict(base_model=self.run.base_model, license=self.run.license)
        return awq_hf.push_to_hub(self.out, self.run.push, private=self.run.private or None, progress=not self.as_json, **of_card)

    def close(self, report: Any, results: dict[str, Any]) -> None:
        from awq_hf.evaluation_table import rows_of, tables

        files = [place.relative_to(self.out).as_posix() for place in self.places]
        if self.as_json:
            found = {**report.to_dict(), "output": str(self.out), "exports": files}
            found |= {"evaluation": results["measure"]} if "measure" in results else {}
            typer.echo(json.dumps(found | ({"push": asdict(results["push"])} if "push" in results else {})))
            return
        if "measure" in results:
            for table in tables(rows_of(results["measure"]), console.width):
                console.print(table)
        if files:
            self.say(f"In {self.out}: {', '.join(files)}")
        if "push" in results:
            self.say(summary(results["push"]))
        else:
            self.say(f"Next:\n\n  {command_line('push', self.out, 'OWNER/NAME')}")
