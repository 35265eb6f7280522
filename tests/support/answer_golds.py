r"""Gold answers as college courses and contests write them: what flips and rewrites are tried on."""

GOLDS = r"""
(n-2) 2^{n}+1
(n+1) 2^{n-1}
n 2^{n-1}-3
\mathrm{e}^2
\mathrm{e}^{-2 x}
1-\frac{1}{\mathrm{e}}
2+3\mathrm{i}
1-\mathrm{i}
4\mathrm{i}
2\mathrm{e}
-1./3
0.5
-3.25
1.5\lfloor x\rfloor
m n-\lfloor m / 2\rfloor
\lceil \frac{n}{2} \rceil + 1
\left\lfloor \frac{n-1}{2} \right\rfloor
\binom{n}{2}-1
\binom{n+1}{k}
n \binom{2n}{n}
x \neq -2
x \neq 2, x \neq -3
2 a - 5 > 0
3 x - y \leq 6
-1 < 2 x + 3 \leq 7
x < -2 \text{ or } x > 5
y \geq 3 x - 1
x \in (-\infty, -2] \cup [5, \infty)
(-\infty, 3)
[-2, 7)
(0, 1) \cup (2, 3)
|x|
|x-1|
2|x|
|x|-|y|
\frac{|x|}{x}
\sqrt{x^2}
\sqrt{x^2+1}
\sqrt[3]{x+1}
\sqrt{x}-\sqrt{y}
x \sqrt{y}
\frac{1}{2} \ln |x|+C
\ln \frac{x}{y}
-\ln |\cos x| + C
\frac{1}{2} e^{2 x} \sin x - x + C
x \ln x - x + C
\log_2 (x-1)
\arctan \frac{x}{3}
\cos 2 x - \sin x
\tan^2 x + 1
e^{-x^2/2}
c_1 e^{x} + c_2 e^{-2 x}
y = c_1 \cos 2 x + c_2 \sin 2 x
y = 2 x^3 - 4 x
y = -\frac{3}{2} x + 4
y - 2 = 3 (x+1)
3 x - 4 y = 12
x^2 + y^2 = 25
\frac{x^2}{9} - \frac{y^2}{16} = 1
(x-3)^2 + (y+1)^2 = 4
x = 4, y = -3
(4, -3)
(2, -1, 5)
\langle 3, -2, 1 \rangle
3 \hat{i} - 2 \hat{j}
\overline{z}+1
2 \vec{a} - 3 \vec{b}
\bar{x} - \mu
y^{\prime} - 2 y
f^{\prime}(x) = 2 x - 3
\frac{d y}{d x} = -\frac{x}{y}
\sum_{n=0}^{\infty} (-1)^n x^{2 n}
\sum_{k=1}^{n} \frac{1}{k}
\int_0^1 x^2 d x
\lim_{x \to 0} \frac{\sin x}{x} - 1
\prod_{i=1}^{n} (1+x_i)
\max (a, b)
\gcd (m, n)
\operatorname{gcd}(m, n)
x \equiv 3 \pmod{7}
a \equiv -1 \pmod{12}
\begin{pmatrix} 1 & -2 \\ 0 & 3 \end{pmatrix}
\left[\begin{array}{cc} a & b \\ -b & a \end{array}\right]
\begin{pmatrix} 1/2 \\ -1 \end{pmatrix}
\begin{vmatrix} a & b \\ c & d \end{vmatrix}
\begin{cases} x+1 & x<0 \\ x-1 & x \geq 0 \end{cases}
\{1, 2, 3\}
\{x \mid x > 2\}
\{-2, 5\}
\frac{3}{4}
-\frac{7}{12}
\frac{\pi}{2}
-2\pi
\frac{\sqrt{3}}{2}
\frac{1+\sqrt{5}}{2}
2 \sqrt{3}-\sqrt{2}
3 \pm 2\sqrt{2}
-1 \pm i
\frac{-b \pm \sqrt{b^2-4 a c}}{2 a}
42
-17
1024
3:5
12 x^3 y - 5 x y^2
(x-2)(x+3)
(a+b)^2 - c
\frac{x-1}{x+2}
\frac{a}{b} - \frac{c}{d}
x_1 - x_2
a_n = 2 n - 1
a_{n+1} - 2 a_n
2^{n}-1
3 \cdot 2^{n-1}
\frac{n(n+1)}{2}
\frac{n!}{k!}
4 r^2 - \pi r^2
V = \frac{1}{3} \pi r^2 h
A B - B A
\triangle A B C
\angle A B C
ABC
AB
\text{even}
\text{odd}
\text{yes}
\text{No}
\text{east}
\text{Tuesday}
\text{no solution}
\text{x-axis}
\text{does not converge}
\text{increasing on } (0, 1)
\infty
-\infty
45^\circ
30^{\circ}-x
25\%
\$12.50
1.2 \times 10^{-3}
p \rightarrow q
P \wedge \neg Q
A \cup B
A \cap B
f \circ g
\alpha - \beta
\theta = \frac{\pi}{3}
k \pi - \frac{\pi}{4}
\frac{\pi}{6} + 2 k \pi, k \in \mathbb{Z}
x^{2/3} - 1
\operatorname{Re}(z) - 1
\nabla f - 2
\partial x - \partial y
A^{-1} B
A^T A
\|v\| - 1
\mathrm{P}(A) - \mathrm{P}(B)
H_0: \mu = 5
1011_2
2x_1 - 3x_2
""".strip().splitlines()
