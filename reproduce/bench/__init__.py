"""`dvpo bench gvm|policy|growth`: what training costs, measured in turns with the peers."""
