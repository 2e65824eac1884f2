"""A long run under random faults: ``python -m tests.soak ENV [options]``, or ``make soak``.

Tasks of this process publish, each message confirmed by the broker; processes of their own
consume. Meanwhile links are cut, reset, silenced and slowed down, the broker is killed, stopped,
frozen and blocked, consumers are killed, and publishing tasks are interrupted. At the end every
message whose publish returned must have been delivered, and nothing may be left behind.

`__main__` reads the arguments, `job` is the run, `consumer` the consuming process, `ledger` the
account, `brokers` what is tormented: one class and one line in `BROKERS` for each kind.
"""
