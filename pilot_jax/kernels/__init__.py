"""Fast implementations of short formulas. Each file begins with the plain formula that it computes; `backend` alone
chooses by the kind of device.
"""
