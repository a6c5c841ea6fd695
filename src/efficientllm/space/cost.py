"""Parameters as an exact polynomial in the units of the bundles, so that no candidate shape has to be built."""

from collections.abc import Mapping
from dataclasses import dataclass

Monomial = tuple[str, ...]  # sorted names; () is the constant term


@dataclass(frozen=True)
class Polynomial:
    """A sum of `coefficient · product of named sizes`."""

    terms: Mapping[Monomial, int]

    def __call__(self, sizes: Mapping[str, int]) -> int:
        """Returns the value at the given sizes."""
        value = 0
        for names, term in self.terms.items():  # loops: a plan asks for millions of shapes
            for name in names:
                term *= sizes[name]
            value += term
        return value

    def __add__(self, other: "Polynomial") -> "Polynomial":
        terms = dict(self.terms)
        for names, coefficient in other.terms.items():
            terms[names] = terms.get(names, 0) + coefficient
        return Polynomial(terms)

    def __mul__(self, other: "Polynomial") -> "Polynomial":
        result = Polynomial({})
        for names, coefficient in self.terms.items():
            for other_names, other_coefficient in other.terms.items():
                product = tuple(sorted(names + other_names))
                result += Polynomial({product: coefficient * other_coefficient})
        return result

    @staticmethod
    def of(coefficient: int, *names: str) -> "Polynomial":
        """Returns the single term `coefficient · names…`."""
        return Polynomial({tuple(sorted(names)): coefficient})
