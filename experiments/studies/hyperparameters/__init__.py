"""Protocol A: what hyperparameters of experts do to their merge, measured beside what the theory predicts.

Stages, each of which goes on where it was stopped: grids (:mod:`.grids`), merges (:mod:`.designs`), constants of every
expert (:mod:`.constants`), predictions and bounds of every merge (:mod:`.pricing`), tables and report (:mod:`.tables`,
:mod:`.report`).  :func:`.run.run_study` does them in order.
"""
