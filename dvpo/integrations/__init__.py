"""Ways into other people's RL loops: a client of the scoring server, TRL, verl.

OpenRLHF needs no code: start the server and pass `--remote_rm_url http://HOST:PORT/get_reward`.
"""
