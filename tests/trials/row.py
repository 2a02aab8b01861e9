"A row of the table of trials."
from dataclasses import dataclass


@dataclass
class Row:
    "A kind of fault and what became of it."
    trial:str # The kind of fault, in a few words
    tried:int # How many trials
    broken:int # In how many of them the promise was broken
    figures:str='' # What was measured, with units
