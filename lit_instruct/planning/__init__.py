"""What a run will need before it is started: memory, communication and time, worked out from a handful of numbers.

Pure arithmetic: nothing here imports torch, reads a weight or asks a device. ``lit-instruct plan`` prints it
(:mod:`lit_instruct.planning.command`); ``scripts/benchmark/plan_check.py`` holds the memory against measurements, and
``docs/scaling.md`` has the results. Bytes are bytes and times seconds everywhere; only tables have larger units.

- :mod:`~lit_instruct.planning.architecture`: how many parameters a configuration has, and which.
- :mod:`~lit_instruct.planning.hardware`: what a device does in a second.
- :mod:`~lit_instruct.planning.activations`: what a pass keeps for its way back.
- :mod:`~lit_instruct.planning.networks`: what each network of a stage keeps all the time, under a memory plan.
- :mod:`~lit_instruct.planning.memory`: the peak of each phase.
- :mod:`~lit_instruct.planning.cost`: operations, bytes and seconds of each phase.
- :mod:`~lit_instruct.planning.settings`: the stage's own configuration files, read for all that.
"""
