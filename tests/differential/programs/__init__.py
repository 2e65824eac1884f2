"""Programs that run on Kombu and on greenkombu; `tests.differential.test_programs` compares them.

Each is a function of a `lab.Lab`: it talks to a broker through the package under test and notes
what it sees.  ``python -m tests.differential.programs PACKAGE ENVIRONMENT URL...`` runs all that
are for the transports of the URLs and writes {URL's transport: {program: transcript}} as JSON.
"""
