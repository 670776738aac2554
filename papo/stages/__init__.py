"""The stages, in the order they run: prepare, warmstart, [rollout, score_orm, score_prm, advantage, train] x rounds, evaluate, report.

Each module has CODE (what of the package its result depends on), an Inputs class and
`run(params, inputs, out, *, engine, context) -> Manifest`, which does nothing when the manifest says that it is done.
"""
