"""What is published beside plain safetensors: torch files, names of a hub, quantised forms; and what to do about the rest."""
