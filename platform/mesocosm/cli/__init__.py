"""The command line, on click. main.py holds the commands; job_command.py runs a job."""
