"""Policies: flow models behind one contract, so that the method knows neither diffusers nor peft."""
