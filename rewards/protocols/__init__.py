"""Published protocols: prompt, reward and verdict of a method's official code, repeated with its mistakes.

They are for comparing with published numbers, and never a default: the tasks without a suffix (``rewards.tasks.gsm8k``,
``rewards.tasks.math``, ``rewards.tasks.countdown``, ``rewards.tasks.sudoku``) have the same data and graders without
these mistakes. Each class lists what is wrong with its source. Three things hold for all of them:

- The verdict (``correct``) is that of the published *evaluation* script, the components are those of the published
  *training* script. Where the two parse differently, so do we.
- Special tokens are gone from a completion before it is graded. The evaluation scripts parsed them too, which matters
  only for completions that stop early without closing their answer tag.
- At most the first ``texts.MAX_CHARACTERS`` characters of a completion are read.
"""
