"""What a command runs: one keyword-only function a program.

Their arguments are the configuration; checks that concern several of them are in start_checks.py.
What two programs share belongs on a floor below.
"""
