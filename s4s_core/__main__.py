"""The command `s4s`, or `python -m s4s_core`: run, count, learn for a pipeline, prepare, list."""

import argparse
import os
import sys
from dataclasses import MISSING, fields
from pathlib import Path

import torch

from .deploy.learn_pipeline import estimate, learn_missing, prepare
from .errors import UsageError, shown, writing
from .evaluate import interval
from .experiments.cache import try_folder
from .experiments.cost import by_dataset, cost, hours, planned, told
from .experiments.experiment import DPM_SOLVER_V3, GRID_NAMES, LEARN, Experiment
from .experiments.run import run
from .learn import LearningDivergedError
from .models.download import home
from .models.inception import RESIZED, save_statistics
from .models.zoo import build, fetch_files, make_reference
from .params import FULL, PRECISIONS, Params, datasets, load_params, read_yaml, settings_for
from .published import SOLVERS

_HELP = {
    "dataset": "a file in params/",
    "grid": ", ".join(GRID_NAMES),
    "solver": f"{', '.join(SOLVERS)} or {DPM_SOLVER_V3}",
    "order": "evaluations a step may use",
    "nfe": "network calls a sample",
    "learn": ", ".join(LEARN),
    "seed": "of the teacher set and of the batches",
}


def main(arguments: list[str] | None = None) -> None:
    """Run the command line; a slip ends it with one sentence and status 1."""
    parser = argparse.ArgumentParser(
        prog="s4s", description="Learn fast solvers of diffusion ODEs."
    )
    commands = parser.add_subparsers(
        required=True, metavar="run | cost | learn | fetch | reference | list"
    )

    runs = commands.add_parser(
        "run", help="learn a solver, measure it, write it to a JSON file",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )  # fmt: skip
    for f in fields(Experiment):
        if f.name != "settings":
            runs.add_argument(f"--{f.name}", type=f.type, default=f.default, help=_HELP[f.name])
    runs.add_argument("--preset", default=FULL, help="named settings of params/<dataset>.yaml")
    runs.add_argument("--out", metavar="FILE", help="the solver file; without, in results/")
    runs.set_defaults(command=_run)

    costs = commands.add_parser("cost", help="say what a notebook would cost, and run nothing")
    costs.add_argument("notebook", help="executed until its first run_all")
    add = costs.add_argument
    add("-p", dest="values", nargs=2, action="append", default=[], metavar=("NAME", "VALUE"),
        help="a parameter, as papermill takes it")  # fmt: skip
    add("-y", dest="yaml", action="append", default=[], help="parameters, as in -y 'seeds: [0]'")
    costs.set_defaults(command=_cost)

    learns = commands.add_parser(
        "learn", help="learn solvers for a diffusers pipeline, write a folder for the Hub",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )  # fmt: skip
    add = learns.add_argument
    add("--pipeline", required=True, help="a folder that diffusers wrote, or a name on the Hub")
    add("--prompts", metavar="FILE", help="a prompt in each line; noises take them in turn")
    add("--class-labels", type=int, nargs="+", metavar="N", help="of a class-conditional network")
    add("--guidance", type=float, default=1.0, help="scale of classifier-free guidance")
    add("--nfe", type=int, nargs="+", default=[5], metavar="N", help=_HELP["nfe"])
    add("--dtype", default="float32", help=f"of the network: {', '.join(PRECISIONS)}")
    add("--no-check", dest="check", action="store_false", help="leave out the self-test")
    add("--out", required=True, metavar="FOLDER", help="where the solvers and their card go")
    learns.set_defaults(command=_learn)

    for command in (runs, learns):
        command.add_argument(
            "--set",
            action="append",
            default=[],
            metavar="KEY=VALUE",
            help="replace a setting, e.g. --set epochs=3; s4s list settings names them",
        )

    fetch = commands.add_parser("fetch", help="download all files that a dataset needs")
    fetch.add_argument("dataset", help=", ".join(datasets()))
    fetch.set_defaults(command=_fetch)

    makes = commands.add_parser(
        "reference", help="make the statistics that an FID compares with, from a folder of images",
        description="Take Inception's features of real images, and keep their mean and covariance. "
        f"Of each image {RESIZED}, to the size of the dataset's pictures (512 for ms_coco). For "
        "ms_coco the folder is MS-COCO's val2014, and the images are those of its captions.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )  # fmt: skip
    makes.add_argument("folder", help="the images: PNG, JPEG or WebP")
    makes.add_argument("--dataset", default="ms_coco", help=_HELP["dataset"])
    makes.add_argument("--out", metavar="FILE", help="a .safetensors file; without, where the "
                       "dataset looks for it")  # fmt: skip
    makes.set_defaults(command=_reference)

    names = commands.add_parser("list", help="list names that the other commands take")
    names.add_argument("what", choices=_LISTS, help="what to list")
    names.set_defaults(command=_list)

    given = vars(parser.parse_args(arguments))
    try:
        given.pop("command")(**given)
    except BrokenPipeError:  # the reader, such as head, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (UsageError, LearningDivergedError, OSError) as error:
        sys.exit(f"error: {error}")


def _run(preset: str, out: str | None, **given) -> None:
    own = {given["dataset"]: dict(_setting(text) for text in given.pop("set"))}
    experiment = Experiment(**given, settings=settings_for(given["dataset"], own, preset))
    path = Path(out) if out else experiment.path().with_suffix(".solver.json")
    if path.is_dir():
        raise UsageError(f"--out takes a file, not the folder {path}")
    path.parent.mkdir(parents=True, exist_ok=True)
    result = run(experiment)
    result.solver.save(path)
    seeds, n_sets, text = f"{result.n_samples} samples, seeds 0-", experiment.params.fid_blocks, ""
    if n_sets > 1:
        low, high = interval(torch.tensor([result.blocks["frechet"]]))
        seeds, text = f"{n_sets} sets of {seeds}", f" (95 % interval {low:.4f} to {high:.4f})"
    seeds += str(n_sets * result.n_samples - 1)
    print(f"Fréchet distance ({result.features}; {seeds})  {result.frechet:.4f}{text}")
    print(f"the same to as many other samples of the teacher  {result.frechet_to_teacher:.4f}")
    print(f"distance to the teacher (root mean square)  {result.distance_to_teacher:.4f}")
    cost = f"{result.evaluations} samples seen by the network, {result.backward} differentiated"
    print(f"seconds of learning  {result.seconds:.1f} ({cost})")
    print(f"solver  {path}")


def _learn(out: str, nfe: list[int], **given) -> None:
    settings = dict(_setting(text) for text in given.pop("set"))
    try:
        job = prepare(given.pop("pipeline"), out, nfe, settings=settings, **given)
        for line in estimate(job) if job.starts else ():
            print(line, flush=True)
        for line in learn_missing(job):
            print(line, flush=True)
    except KeyboardInterrupt:
        sys.exit(f"interrupted: {out} has what is learned; the same command learns what is missing")
    print(f"solvers  {out}")


def _cost(notebook: str, values: list[list[str]], yaml: list[str]) -> None:
    given = {name: read_yaml(value, f"the value of -p {shown(name)}") for name, value in values}
    for text in yaml:
        more = read_yaml(text, "the value of -y")
        if not isinstance(more, dict):
            raise UsageError(f"-y takes parameters by name, as in 'seeds: [0]', not {shown(text)}")
        given |= more
    experiments, others = planned(notebook, given)
    for dataset, own in by_dataset(experiments).items():
        total = cost(own)
        print(f"{dataset}, where nothing is cached:", *told(total), sep="\n", flush=True)
        setup = build(dataset, own[0].params)
        print(f"{hours(total, setup):15.2f} hours, about, on {setup.device}, in one process")
    if others:
        print(f"{others} other statements run something, too, which is not counted")


def _setting(text: str) -> tuple[str, object]:
    key, equals, value = text.partition("=")
    if not (equals and value):
        raise UsageError(f"--set takes KEY=VALUE with a YAML value, not {shown(text)}")
    return key, read_yaml(value, f"the value of --set {shown(key)}")


def _fetch(dataset: str) -> None:
    for path in fetch_files(dataset):
        print(path)


def _reference(folder: str, dataset: str, out: str | None) -> None:
    place = load_params(dataset).fid_reference
    if not out and (not place or "://" in place):
        where = place or "in the package"
        raise UsageError(f"{dataset} has its statistics, {where}: say --out FILE to make others")
    path = Path(out) if out else home() / place
    if path.suffix != ".safetensors":
        raise UsageError(
            f"--out takes a .safetensors file, which holds how it was made, not {path}"
        )
    if path.exists():
        raise UsageError(f"{path} is there already: remove it, or choose another --out")
    with writing(path):
        try_folder(path.parent)  # before the work
    sums, how = make_reference(dataset, folder)
    save_statistics(path, sums, **how)
    print(f"{sums.n} images, {how['features']}")
    print(f"{how['resizing']}, to {how['pixels']} pixels a side")
    print(path)


def _list(what: str) -> None:
    print("\n".join(_LISTS[what]()), flush=True)


def _settings() -> list[str]:
    """One line each: name, type, default and what it is."""
    lines = []
    for f in fields(Params):
        kind = f.type.__name__ if isinstance(f.type, type) else str(f.type)
        choices = ", ".join(f.metadata["choices"])
        default = "required" if f.default is MISSING else f.default
        about = f.metadata["about"] + (f": {choices}" if choices else "")
        lines.append(f"{f.name:18} {kind:16} {default!s:10} {about}")
    return lines


_LISTS = {
    "datasets": lambda: [f"{name:14} {load_params(name).shape}" for name in datasets()],
    "solvers": lambda: [*SOLVERS, DPM_SOLVER_V3],
    "grids": lambda: GRID_NAMES,
    "learners": lambda: list(LEARN),
    "settings": _settings,
}


if __name__ == "__main__":
    main()
