"""What merging files costs: this project, mergekit and FusionBench on the same files, and the floor.

The parent (:mod:`benchmarks.merge_speed.run`) starts one process per run (:mod:`benchmarks.merge_speed.worker`), which
works under the interpreter of the tool that it measures; so the modules that a worker needs import nothing but the
standard library until it is told which tool it is.
"""
