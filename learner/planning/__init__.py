"""What a run will need before it runs: memory by item, operations, bytes and time, from its settings and its model's
config.json alone. ``learner.plan`` prints it, ``learner.control.launch`` refuses what can't fit.

    shapes       a model's sizes                  activations  what a forward and backward keep, per token and layer
    memory       items of a rank and of an actor  flops, compute  operations, bytes and time of an iteration
    hardware     the memory that is there         fit          what fits, and what to change first when it doesn't
    report       the table, and JSON

docs/planning.md has the formulas, and how far off they were when measured.
"""
