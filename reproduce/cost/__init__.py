"""What training costs: memory and time from first principles, the paper's Tables 6 and 7, and the planner's answers.

`shapes` and `hardware` are data; `work` says which models a method has; `memory` and `timing` compute one update of one
job on one cluster; `calls` counts what the online loop really does; `table7` fits three constants; `planner` answers
questions. Bytes and seconds everywhere, for one device; a GiB is 2^30 bytes, as torch and the driver count.
"""
