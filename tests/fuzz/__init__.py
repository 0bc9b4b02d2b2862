"""Random calls of everything public, each checked against rules and an oracle of their own.

    PYTHONPATH=tests python -m fuzz --calls 20000 [--seed S]     two child processes, a report
    PYTHONPATH=tests python -m fuzz --seed S --call I            that call again, with its arguments

A call is made from its seed and number alone (`making`), judged by its arguments (`rules`), run
between guard bands (`memory`), and compared with float64 (`oracle`, `oracle_gradients`).  Nothing
here asks normkit.reference, normkit.testing or normkit's own checks what is right.
"""
