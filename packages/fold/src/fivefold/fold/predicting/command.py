"""The commands ``predict`` and ``evaluate``: their options, and what they do."""

import argparse
from collections.abc import Iterable, Iterator
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING

from fivefold.fold.errors import FoldConfigError, FoldDataError

if TYPE_CHECKING:
    from fivefold.fold.data.features import Example
    from fivefold.fold.model.alphafold import AlphaFold
    from fivefold.fold.predicting.predict import Prediction


def add_predict(parser: argparse.ArgumentParser) -> None:
    """Declare the options of ``predict``."""
    parser.description = (
        "Predict structures. Of each chain NAME.pdb and NAME.cif with the expected lDDT as B "
        "factors, NAME.json with the confidence and NAME.png, where matplotlib is installed."
    )
    parser.add_argument(
        "--fasta", nargs="+", default=[], metavar="FILE", help="sequences, each by itself"
    )
    parser.add_argument(
        "--a3m", nargs="+", default=[], metavar="FILE", help="alignments (a3m, Stockholm) of one"
    )
    parser.add_argument(
        "--mmcif", metavar="FILE", help="a structure whose chains to predict, and to compare with"
    )
    parser.add_argument("--chain", action="append", default=[], help="of --mmcif (default: all)")
    parser.add_argument("--hhr", metavar="FILE", help="with --a3m: hits of HHsearch, for templates")
    parser.add_argument("--templates", metavar="FOLDER", help="with --hhr: structures, 1abc.cif")
    parser.add_argument("--templates-before", metavar="DATE", help="released before year-month-day")
    parser.add_argument(
        "--params", required=True, metavar="PATH", help="AlphaFold's .npz, a .pt, a folder, the Hub"
    )
    parser.add_argument("--out", default="predictions", metavar="FOLDER", help="%(default)s")
    parser.add_argument("--num-recycles", type=int, default=3, metavar="N", help="%(default)s")
    parser.add_argument(
        "--max-msa-clusters", type=int, default=512, metavar="N", help="%(default)s"
    )
    parser.add_argument("--max-extra-msa", type=int, default=1024, metavar="N", help="%(default)s")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the MSA's rows")
    parser.add_argument(
        "--chunk-size", type=int, metavar="N", help="rows at a time, for long chains"
    )
    parser.add_argument("--device", default=None, help="cpu or cuda (default: cuda where it is)")


def add_evaluate(parser: argparse.ArgumentParser) -> None:
    """Declare the options of ``evaluate``."""
    parser.description = (
        "Score predictions by known structures: lDDT, dRMSD, RMSD, GDT and TM-score of alpha "
        "carbons. 1abc_A.pdb is compared with chain A of 1abc.cif."
    )
    parser.add_argument("--predictions", required=True, metavar="PATH", help="a file or a folder")
    parser.add_argument("--structures", required=True, metavar="PATH", help="a file or a folder")
    parser.add_argument("--json", metavar="FILE", help="write all scores there too")


def run_predict(options: argparse.Namespace) -> int:
    """Predict; the exit status."""
    import torch

    from fivefold.fold.config import FeatureConfig
    from fivefold.fold.model.alphafold import AlphaFold
    from fivefold.fold.predicting.predict import predict

    _check(options)
    model = AlphaFold.from_pretrained(options.params)
    model.chunk_size = options.chunk_size
    model.to(options.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    config = FeatureConfig(
        max_msa_clusters=options.max_msa_clusters,
        max_extra_msa=options.max_extra_msa,
        max_templates=0 if model.config.template is None else 4,
        num_recycles=options.num_recycles,
    )
    for example in _examples(options, model):
        found = predict(model, example, config, seed=options.seed)
        _write(found, example, Path(options.out))
    return 0


def _check(options: argparse.Namespace) -> None:
    if bool(options.fasta) + bool(options.a3m or options.mmcif) != 1:
        raise FoldConfigError("predict needs --fasta, --a3m or --mmcif (which --a3m can go with)")
    if options.chain and not options.mmcif:
        raise FoldConfigError("--chain is of a structure: name it with --mmcif")
    if bool(options.hhr) != bool(options.templates) or (options.hhr and not options.a3m):
        raise FoldConfigError("templates need --a3m, --hhr and --templates, all three")
    for name, least in (("num_recycles", 0), ("chunk_size", 1)):
        value = getattr(options, name)
        if value is not None and value < least:
            raise FoldConfigError(f"--{name.replace('_', '-')} is at least {least}, found {value}")


def _examples(options: argparse.Namespace, model: "AlphaFold") -> Iterator["Example"]:
    from fivefold.fold.predicting import inputs

    if options.fasta:
        return chain.from_iterable(map(inputs.from_fasta, options.fasta))
    if options.mmcif:
        return inputs.from_structure(options.mmcif, options.chain, options.a3m)
    return iter([_with_templates(inputs.from_alignments(options.a3m), options, model)])


def _with_templates(
    example: "Example", options: argparse.Namespace, model: "AlphaFold"
) -> "Example":
    from dataclasses import replace

    from fivefold.fold.data.templates import TemplateFilters, find_templates

    if not options.hhr:
        return example
    if model.config.template is None:
        raise FoldConfigError(f"the network of {options.params} takes no templates; no --hhr then")
    filters = TemplateFilters(max_templates=4, released_before=options.templates_before)
    found = find_templates(options.hhr, example.sequence, options.templates, filters)
    for each in found.dropped:
        print(f"no template {each['name']}: {each['reason']}")
    print(f"templates of {example.name}: {', '.join(found.names) or 'none'}")
    return replace(example, templates=found.templates)


def _write(found: "Prediction", example: "Example", out: Path) -> None:
    from fivefold.fold.predicting import files

    out.mkdir(parents=True, exist_ok=True)
    files.write_mmcif(found, out / f"{found.name}.cif")
    report = files.report_of(found)
    told = f"{found.name}: {len(found.sequence)} residues, mean pLDDT {found.mean_plddt:.1f}"
    told += "" if found.ptm is None else f", pTM {found.ptm:.3f}"
    if example.chain is not None:
        report["scores"] = _scores(found, example)
        told += f", lDDT-CA {report['scores']['lddt_ca']:.3f}"
        told += f", TM-score {report['scores']['tm_score']:.3f}"
    files.write_report(report, out / f"{found.name}.json")
    notes: Iterable[str] = ()
    try:
        files.write_pdb(found, out / f"{found.name}.pdb")
        files.plot(found, out / f"{found.name}.png")
    except (ImportError, FoldDataError) as error:
        notes = (str(error),)
    print(f"{told}; {out / found.name}.cif", *notes, sep="\n  ")


def _scores(found: "Prediction", example: "Example") -> dict[str, float]:
    from dataclasses import asdict

    import torch

    from fivefold.fold.metrics import score

    if example.chain is None:
        return {}
    truth = torch.from_numpy(example.chain.positions), torch.from_numpy(example.chain.mask)
    return {name: float(value) for name, value in asdict(score(found.positions, *truth)).items()}


def run_evaluate(options: argparse.Namespace) -> int:
    """Score, print a table, and return the exit status."""
    from fivefold.fold.predicting.evaluate import evaluate
    from fivefold.parallel_core.files import write_json

    found = evaluate(options.predictions, options.structures)
    rows = {**found.scores, **({"mean": found.means()} if len(found.scores) > 1 else {})}
    names = list(next(iter(rows.values()), {}))
    if names:
        print(f"{'':16}" + "".join(f"{name:>10}" for name in names))
    for name, values in rows.items():
        print(f"{name[:16]:16}" + "".join(f"{values.get(n, float('nan')):10.3f}" for n in names))
    for each in found.problems:
        print(f"cannot score {each['name']}: {each['reason']}")
    if options.json:
        write_json(options.json, found.to_dict())
    return 0 if found.scores else 1
