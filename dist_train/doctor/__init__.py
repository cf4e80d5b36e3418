"""`dist-train doctor`: is this machine, or this allocation, fit for a training?"""
