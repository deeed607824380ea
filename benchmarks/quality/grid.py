"""Train and evaluate a list of settings, several side by side on one device, within a limit of minutes.

    python -m benchmarks.quality.grid benchmarks/quality/grid_gpu.yaml --data ml1m=work/ml1m --jobs 4 --minutes 14
    python -m benchmarks.quality.grid my.yaml --data scientific=path/to/amazon_scientific --out work/grid

A settings file names what is trained; data sets are names there, and folders on the command line (``missrec etl``'s, or
raw ones, which go through the ETL first)::

    evaluate: [valid]                  # splits; by default valid and test
    runs:
      - name: two_layers               # of its folder and its lines
        data: ml1m                     # given as --data ml1m=FOLDER
        recipe: long                   # default: default
        seeds: [2020, 2021]            # default: [2020]
        set: {model.n_decoder_layers: 2}

Every training is a process of its own, in the order of the file, seed after seed. One JSON line per training is
appended to ``OUT/results.jsonl`` when it ends. When the minutes are over, what still trains is interrupted as by
Ctrl-C: its best weights are evaluated, its line says ``"stopped_by": "interrupt"``. What does not end within
``--grace`` either is killed; its line has what its training log had. The same command goes on: finished trainings are
skipped, others resumed; other data under the name of finished ones are refused. Baselines and terms without network are
not ranked: they do not depend on what is varied.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple

import yaml

from benchmarks.measure import report, run_as_command
from benchmarks.quality.bench import no_words_option, pairs, with_current_blends
from missrec_t4r.config import Recipe
from missrec_t4r.config.checks import refuse_unknown
from missrec_t4r.config.yaml_text import parse_yaml
from missrec_t4r.errors import ConfigError, DataError
from missrec_t4r.evaluation.full_ranking import PROTOCOLS
from missrec_t4r.io.json_files import read_json, write_json

log = logging.getLogger(__name__)

SPLITS: Final = ("valid", "test")
METRICS: Final = ("recall@10", "ndcg@10")
RESULTS_FILE: Final = "results.jsonl"
_FACTS = ("best_epoch", "epochs", "stopped_by", "valid_ndcg@10", "seconds", "device", "precision")
_JOB_FILE, _DONE_FILE, _OUTPUT_FILE = "job.json", "result.json", "output.log"
_IDENTIFYING = ("name", "data", "recipe", "settings", "seed")
_POLL_SECONDS = 0.2


class Job(NamedTuple):
    """One training of a grid."""

    name: str
    data: str
    """Name of the data set."""
    folder: str
    """Its data folder."""
    recipe: str
    settings: dict[str, Any]
    seed: int
    device: str
    evaluate: list[str]

    def run_folder(self, out: Path) -> Path:
        """Return the run folder."""
        return out / self.data / self.name / f"seed-{self.seed}"

    @property
    def asked(self) -> dict[str, Any]:
        """What its line starts with."""
        return {name: getattr(self, name) for name in _IDENTIFYING}

    @property
    def key(self) -> str:
        """What identifies its line."""
        return _key(self.asked)


def grid(
    jobs: Sequence[Job], out: Path, *, side_by_side: int = 1, minutes: float = 0.0, grace: float = 60.0
) -> list[dict[str, Any]]:
    """Run the trainings that are not finished yet and return the lines of all that are.

    Parameters
    ----------
    jobs : sequence of Job
    out : Path
        Folder of the results and of the run folders.
    side_by_side : int
        Processes at a time; they share the cores.
    minutes : float
        After which nothing is started and what trains is interrupted; 0 for no limit.
    grace : float
        Seconds that an interrupted training has for its last step and its evaluation.
    """
    out.mkdir(parents=True, exist_ok=True)
    results = out / RESULTS_FILE
    done = _finished(results)
    waiting = [job for job in jobs if job.key not in done]
    log.info(f"{len(jobs) - len(waiting)} of {len(jobs)} trainings are finished; {side_by_side} at a time")
    running: list[tuple[Job, subprocess.Popen[bytes]]] = []
    end, is_over = time.monotonic() + 60 * minutes if minutes else math.inf, False
    try:
        while waiting or running:
            now = time.monotonic()
            if now >= end and not is_over:
                is_over = True
                log.info(f"{minutes:g} minutes are over: {len(running)} are interrupted, {len(waiting)} not started")
                waiting = []
                for _, process in running:
                    process.send_signal(signal.SIGINT)
            while waiting and len(running) < side_by_side:
                job = waiting.pop(0)
                running.append((job, _start(job, out, side_by_side)))
            ended = [one for one in running if one[1].poll() is not None or now >= end + grace]
            running = [one for one in running if one not in ended]
            _record(ended, out)
            time.sleep(_POLL_SECONDS)
    finally:  # an error or Ctrl-C leaves no process behind; what they had trained is resumed
        _record(running, out)
    done = _finished(results)
    return [done[job.key] for job in jobs if job.key in done]


def read_jobs(file: Path, folders: Mapping[str, str], *, device: str = "auto", only: Sequence[str] = ()) -> list[Job]:
    """Read a settings file; see the module's docstring.

    Parameters
    ----------
    file : Path
        YAML.
    folders : mapping of str to str
        Folder of every data set; trainings on others are left out.
    device : str
        As in `missrec train`.
    only : sequence of str
        Names of trainings; all by default.

    Raises
    ------
    ConfigError
        A key, setting or split that is unknown, a name twice, or nothing that is left to train.
    """
    try:
        content = parse_yaml(file.read_bytes())
    except (OSError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())
        raise ConfigError(f"{file} cannot be read ({reason})", "a YAML file with runs:") from error
    if not isinstance(content, Mapping) or not content.get("runs"):
        raise ConfigError(f"{file} has no runs", "a YAML file with runs:", "benchmarks/quality/grid_gpu.yaml is one")
    refuse_unknown(content, ["evaluate", "runs"], f"setting in {file}: ")
    evaluate = list(content.get("evaluate", SPLITS))
    refuse_unknown(evaluate, list(SPLITS), f"split in {file}: ")
    jobs: list[Job] = []
    for entry in content["runs"]:
        refuse_unknown(entry, ["name", "data", "recipe", "seeds", "set"], f"setting of a run in {file}: ")
        name, data, settings = entry["name"], entry["data"], dict(entry.get("set") or {})
        if not re.fullmatch(r"[\w.+-]+", name):
            raise ConfigError(f"{file}: the name {name!r}", "letters, digits, and . _ + -", "it names a folder")
        if data not in folders or (only and name not in only):
            continue
        recipe = str(entry.get("recipe", "default"))
        Recipe.load(recipe, settings)  # an unknown setting is an error now, not after the trainings before it
        common = name, data, str(folders[data]), recipe, settings
        jobs += [Job(*common, seed, device, evaluate) for seed in entry.get("seeds", [2020])]
    places = [(job.data, job.name, job.seed) for job in jobs]
    if twice := sorted({f"{data}: {name}" for data, name, seed in places if places.count((data, name, seed)) > 1}):
        raise ConfigError(f"{file} has {', '.join(twice)} twice", "one training per data set, name and seed")
    if not jobs:
        wanted = sorted({entry["data"] for entry in content["runs"]})
        raise ConfigError(
            f"{file} has nothing to train for --data {', '.join(folders) or '(none)'}",
            f"--data NAME=FOLDER for one of {', '.join(wanted)}",
            "see --data and --only",
        )
    return jobs


def train_and_evaluate(job: Job, run: Path) -> dict[str, Any]:
    """Train, in this process, and rank the splits with the network and with the full model; return the line."""
    from missrec_t4r import commands

    settings = {**job.settings, "train.seed": job.seed}
    trained = commands.train(job.folder, run, recipe=job.recipe, settings=settings, device=job.device, reuse=True)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the limit ends trainings; what they gave is evaluated
    line = job.asked | {key: trained[key] for key in _FACTS if key in trained}
    for split in job.evaluate:
        found = commands.evaluate(run, split=split, baselines=False)  # type: ignore[arg-type]  # read_jobs checked it
        line[split] = {
            protocol: {
                system: {metric: round(values[metric], 5) for metric in METRICS}
                for system, values in found["protocols"][protocol].items()
            }
            for protocol in PROTOCOLS
        }
        line["blend_settings"] = found["blend_settings"]["model"]  # with NDCG@10 on validation, of the network as well
    return line


def _start(job: Job, out: Path, side_by_side: int) -> subprocess.Popen[bytes]:
    """Start a training in a process of its own; its output goes to a file of its run folder."""
    run = job.run_folder(out)
    run.mkdir(parents=True, exist_ok=True)
    (run / _DONE_FILE).unlink(missing_ok=True)
    write_json(run / _JOB_FILE, job._asdict())
    threads = str(max(1, (os.cpu_count() or 1) // side_by_side))
    command = [sys.executable, "-m", "benchmarks.quality.grid", "--job", str(run)]
    with (run / _OUTPUT_FILE).open("ab") as output:
        return subprocess.Popen(
            command,
            stdout=output,
            stderr=subprocess.STDOUT,
            env={"OMP_NUM_THREADS": threads, **os.environ},
            cwd=Path(__file__).parents[2],
            start_new_session=True,  # Ctrl-C in the terminal is ours to pass on
        )


def _record(ended: Sequence[tuple[Job, subprocess.Popen[bytes]]], out: Path) -> None:
    """Append the lines of processes, which are killed if they still run: the checkpoint of their training stays."""
    for job, process in ended:
        if process.poll() is None:
            process.kill()
        _append(out / RESULTS_FILE, _line(job, out, process.wait()))


def _line(job: Job, out: Path, code: int) -> dict[str, Any]:
    """Return the line of a process that has ended: its result, or what its training log had when it was stopped."""
    run = job.run_folder(out)
    if (run / _DONE_FILE).is_file():
        return read_json(run / _DONE_FILE)
    epochs = []
    if (run / "log.jsonl").is_file():
        epochs = [json.loads(line) for line in (run / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    best = max((epoch["valid_ndcg@10"] for epoch in epochs), default=None)
    output = (run / _OUTPUT_FILE).read_text(encoding="utf-8", errors="replace").strip().splitlines()
    why = "killed" if code < 0 else f"failed: {output[-1] if output else f'exit status {code}'}"
    return job.asked | {"stopped_by": why, "epochs": len(epochs), "valid_ndcg@10": best}


def _append(file: Path, line: Mapping[str, Any]) -> None:
    with file.open("a", encoding="utf-8") as lines:
        lines.write(json.dumps(line, default=float) + "\n")
    shown = {split: _shown(line[split]) for split in SPLITS if split in line}
    log.info(f"{line['data']} {line['name']} {line['seed']}: {line.get('stopped_by')} {shown}")


def _shown(protocols: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    """Return NDCG@10 by protocol and system."""
    return {
        protocol: {system: values["ndcg@10"] for system, values in systems.items()}
        for protocol, systems in protocols.items()
    }


def _key(line: Mapping[str, Any]) -> str:
    return json.dumps([line[name] for name in _IDENTIFYING], sort_keys=True)


def _finished(file: Path) -> dict[str, dict[str, Any]]:
    """Return the last line of every training that came to its end; a line that was cut off is none."""
    done: dict[str, dict[str, Any]] = {}
    for text in file.read_text(encoding="utf-8").splitlines() if file.is_file() else []:
        try:
            line = json.loads(text)
        except json.JSONDecodeError:
            continue
        if not str(line["stopped_by"]).startswith(("interrupt", "killed", "failed")):
            blends = {"blend_settings": with_current_blends(line["blend_settings"])} if "blend_settings" in line else {}
            done[_key(line)] = line | blends
    return done


def _prepared(name: str, folder: Path, out: Path, words: bool) -> str:
    """Return a data folder: the given one, or what the ETL makes of a raw one.

    Raises
    ------
    DataError
        Its finished lines are of other data, or of data that nothing tells of.
    """
    from benchmarks.quality.datasets import is_recorded, prepare

    results, data = out / RESULTS_FILE, out / name / "data"
    if not is_recorded(data) and any(line["data"] == name for line in _finished(results).values()):
        raise DataError(
            f"{results} has finished lines of {name}, and nothing in {data} says of which data",
            "lines of the data that are given",
            f"give another --out or another name than {name}, or remove these lines to train anew",
        )
    return str(prepare(folder, data, words=words).resolve())


def main(words: Sequence[str] | None = None) -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("settings", type=Path, nargs="?", help="YAML file")
    parser.add_argument("--data", action="append", default=[], help="NAME=FOLDER; repeatable")
    parser.add_argument("--only", action="append", default=[], help="name of a training; repeatable, all by default")
    parser.add_argument("--out", type=Path, default=Path("work/grid"), help="results and run folders")
    no_words_option(parser)
    parser.add_argument("--jobs", type=int, default=1, help="trainings at a time")
    parser.add_argument("--minutes", type=float, default=0.0, help="limit; 0 for none")
    parser.add_argument("--grace", type=float, default=60.0, help="seconds that interrupted trainings have to end")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    parser.add_argument("--report", metavar="NAME", help="also write DATE-NAME.json to benchmarks/results")
    parser.add_argument("--job", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args(words)
    if options.job is not None:
        job = Job(**read_json(options.job / _JOB_FILE))
        write_json(options.job / _DONE_FILE, train_and_evaluate(job, options.job))
        return
    if options.settings is None:
        parser.error("a settings file is needed")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # as Ctrl-C: ends the trainings as well
    folders = {
        name: _prepared(name, Path(folder), options.out, options.words) for name, folder in pairs(options.data).items()
    }
    jobs = read_jobs(options.settings, folders, device=options.device, only=options.only)
    lines = grid(jobs, options.out, side_by_side=options.jobs, minutes=options.minutes, grace=options.grace)
    if options.report:
        report(options.report, {"settings_file": options.settings.name, "runs": lines})
    else:
        print(json.dumps({"finished": len(lines), "of": len(jobs), "results": str(options.out / RESULTS_FILE)}))


if __name__ == "__main__":
    run_as_command(main)
