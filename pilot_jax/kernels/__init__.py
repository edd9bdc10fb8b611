"""Fast twins of short formulas. Each file opens with the plain formula that its code equals; `backend` alone chooses
by the kind of device.

Imports parallel, config, errors.
"""
