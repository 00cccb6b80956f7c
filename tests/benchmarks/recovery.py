"""Fine-tuning settings, one changed at a time: the pruned and repaired model beside the dense one, same budget.

    python tests/benchmarks/recovery.py --vary learning_rate=3e-5,3e-4 warmup=0,0.3 distillation=0.5,1 teacher=0.5,1 \
        OPTIONS

OPTIONS are those of PruningAndFineTuningColab.py; also its constants can be varied (warmup, weight_decay, patience).
`teacher` is distillation from the fine-tuned dense model instead of the dense one. Heads are chosen and repaired once.
The settings are to be chosen by the validation column; the test column only reports.
"""

import copy
import dataclasses
from unittest import mock

from common import begin, close, head, nb, parser_for, say, scores, trained


def main():
    parser = parser_for(__doc__)
    parser.add_argument("--vary", nargs="+", default=[], metavar="NAME=VALUE,...")
    chosen, rest = parser.parse_known_args()
    run, _, model, blocks = begin(rest)
    settings, test, seen = run.settings, blocks["tested"], blocks["validation"][:16]
    dense = nb.remove_gates(copy.deepcopy(model))
    close(model, scores(model, blocks, settings), settings)
    pruned = nb.repair(model, blocks["repair"])

    def tune(model, settings, teacher=None):
        tuned, record = trained(run, model, blocks, settings, teacher)
        return tuned, min(value for _, value in record["history"]["perplexity"]), nb.perplexity(tuned, test)

    def row(name, pruned, dense):
        numbers = [f"{value:.3f}" for value in (*pruned[1:], *dense[1:])]
        gaps = [f"{pruned[which] / dense[which] - 1:+.1%}" for which in (1, 2)]
        say(name, *numbers, *gaps)

    head("", "pruned: validation", "test", "dense: validation", "test", "gap, validation", "test")
    row("before fine-tuning", *((None, nb.perplexity(m, seen), nb.perplexity(m, test)) for m in (pruned, dense)))
    control = tune(copy.deepcopy(dense), settings)
    row("defaults", tune(nb.compact(pruned), settings, dense), control)
    for name, value in ((name, value) for words in chosen.vary for name, _, values in [words.partition("=")]
                        for value in values.split(",")):  # fmt: skip
        if name in ("distillation", "teacher"):
            own = dataclasses.replace(settings, distillation=value)
            row(f"{name} {value}", tune(nb.compact(pruned), own, {"teacher": control[0]}.get(name, dense)), control)
        elif name in ("warmup", "weight_decay", "patience"):
            with mock.patch.object(nb, name.upper(), float(value)):
                row(f"{name} {value}", tune(nb.compact(pruned), settings, dense), tune(copy.deepcopy(dense), settings))
        else:
            own = dataclasses.replace(settings, **{name: value})
            row(f"{name} {value}", tune(nb.compact(pruned), own, dense), tune(copy.deepcopy(dense), own))
    print(f"\n{nb.conditions(run.metrics)}")


if __name__ == "__main__":
    main()
