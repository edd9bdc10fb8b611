"""Tables of the emoji set: which emoji become concepts, which kind each one is, and which are near-duplicates.

They name emoji by their English CLDR names, as emojibase writes them. Only `emoji_build.py` needs them.
"""

from __future__ import annotations

# Kinds that a picture can tell apart, with the subgroups of Unicode whose emoji they are. Subgroups that no kind has
# (symbols, arrows, flags, hands, families, hearts, keycaps, signs, zodiac) show no thing, and are left out.
SUBGROUPS: dict[str, tuple[str, ...]] = {
    "mammal": ("animal-mammal",),
    "bird": ("animal-bird",),
    "reptile": ("animal-reptile",),
    "sea animal": ("animal-marine",),
    "bug": ("animal-bug",),
    "flower": ("plant-flower",),
    "plant": ("plant-other",),
    "fruit": ("food-fruit",),
    "vegetable": ("food-vegetable",),
    "food": ("food-prepared", "food-asian"),
    "sweets": ("food-sweet",),
    "drink": ("drink",),
    "household item": ("dishware", "household", "lock", "time"),
    "building": ("place-building", "place-religious"),
    "landscape": ("place-geographic", "place-other"),
    "land vehicle": ("transport-ground",),
    "boat": ("transport-water",),
    "aircraft": ("transport-air",),
    "sky object": ("sky-weather",),
    "festive item": ("event",),
    "sports equipment": ("sport",),
    "toy or game": ("game",),
    "clothing": ("clothing",),
    "musical instrument": ("musical-instrument",),
    "electronic device": ("phone", "computer", "light-video"),
    "book or paper": ("book-paper",),
    "office item": ("writing", "office"),
    "money": ("money",),
    "mail": ("mail",),
    "tool": ("tool",),
    "medical or lab item": ("science", "medical"),
    "body part": ("body-parts",),
    "face": (
        "face-smiling", "face-affection", "face-tongue", "face-hand", "face-neutral-skeptical", "face-sleepy",
        "face-unwell", "face-hat", "face-glasses", "face-concerned", "face-negative"),
    "person": ("person-role", "person-fantasy", "person-activity", "person-sport"),
}

# In the tables below, an entry is a name and its emoji; lines that are indented continue an entry (see `table`).

# The kind of emoji whose subgroup says something else than their picture, or belongs to no kind. Emoji of the kind
# "none" are asked for their name and colour alone.
MOVED = """
bag: purse, handbag, clutch bag, shopping bags, backpack, luggage, briefcase
weather: cloud, sun behind cloud, cloud with lightning and rain, sun behind small cloud, sun behind large cloud, sun
  behind rain cloud, cloud with rain, cloud with snow, cloud with lightning, tornado, fog, wind face, cyclone,
  rainbow, snowflake, snowman, snowman without snow, umbrella with rain drops, high voltage, droplet, foggy
household item: teapot, closed umbrella, umbrella, umbrella on ground, candle, light bulb, flashlight, red paper
  lantern, diya lamp, bell, bellhop bell, framed picture, wastebasket
electronic device: studio microphone, microphone, headphone, radio, control knobs, level slider, satellite antenna,
  video game, joystick
musical instrument: postal horn
book or paper: memo, calendar, tear-off calendar, spiral notepad, spiral calendar, clipboard, bar chart, chart
  increasing, chart decreasing, card index, receipt
sports equipment: skateboard, bullseye
toy or game: kite, balloon, water pistol
medical or lab item: thermometer
landscape: water wave
building: tent, circus tent, fountain
land vehicle: suspension railway
sky object: milky way
body part: skull
mail: love letter
sweets: moon cake, dango, fortune cookie
tool: magnifying glass tilted left, magnifying glass tilted right, paintbrush
plant: Christmas tree, tanabata tree
face: clown face, ogre, goblin
person: baby, child, person, older person
clothing: thong sandal, man’s shoe, running shoe, hiking boot, flat shoe, high-heeled shoe, woman’s sandal, ballet
  shoes, woman’s boot, ice skate, roller skate, crown, woman’s hat, top hat, graduation cap, billed cap, military
  helmet, rescue worker’s helmet
none: frog, ghost, alien, alien monster, robot, pile of poo, trophy, military medal, sports medal, 1st place medal,
  2nd place medal, 3rd place medal, anchor, ring buoy, parachute, fire, mushroom, feather, spider web, nest with eggs,
  spiral shell, artist palette, thread, yarn, ring, gem stone, lipstick, ice, rock, wood, brick, wheel, oil drum, fuel
  pump, vertical traffic light, stop sign, moai, barber pole, paw prints, ferris wheel, roller coaster, playground
  slide
"""

# Emoji of these subgroups that are left out. `emoji_build.py` also leaves out those that a style lacks, gender variants
# ("man cook", "woman cook": their neutral form stays), skin tones, and pictures that face right.
LEFT_OUT = """
parts and marks: pig nose, wing, coral, microbe, white flower, rosette, empty nest, salt, jar, pouring liquid,
  elevator, building construction, globe with meridians, bus stop, motorway, railway track, police car light,
  horizontal traffic light, construction, manual wheelchair, motorized wheelchair, seat, mountain cableway, aerial
  tramway, watch, admission tickets, ticket, spade suit, heart suit, diamond suit, club suit, prayer beads, hair pick,
  folding hand fan, mobile phone with arrow, low battery, film frames, videocassette, camera with flash, label, chart
  increasing with yen, ballot box with ballot, e-mail, incoming envelope, envelope with arrow, card index dividers,
  drop of blood, eye in speech bubble, comet, sparkles, ribbon, reminder ribbon, moon viewing ceremony, Tokyo tower,
  hot springs, martial arts uniform, running shirt, bagel, national park, carousel horse, white cane, skull and
  crossbones, chains, tongue, biting lip, ear with hearing aid, eye, map of Japan, wedding, goal net, woman’s clothes,
  locked with pen, locked with key, outbox tray, inbox tray, love hotel, hollow red circle, broken chain, x-ray
the faces of one clock but one: twelve o’clock, twelve-thirty, one o’clock, one-thirty, two o’clock, two-thirty,
  three-thirty, four o’clock, four-thirty, five o’clock, five-thirty, six o’clock, six-thirty, seven o’clock,
  seven-thirty, eight o’clock, eight-thirty, nine o’clock, nine-thirty, ten o’clock, ten-thirty, eleven o’clock,
  eleven-thirty
faces that differ from others by a stroke: grinning face with smiling eyes, smiling face with smiling eyes, kissing
  face, kissing face with closed eyes, kissing face with smiling eyes, squinting face with tongue, smiling face with
  tear, face with open eyes and hand over mouth, face with peeking eye, smiling face with open hands, face without
  mouth, dotted line face, face with rolling eyes, lying face, shaking face, head shaking horizontally, head shaking
  vertically, smirking face, face exhaling, relieved face, face with diagonal mouth, slightly frowning face, hushed
  face, distorted face, face holding back tears, frowning face with open mouth, sad but relieved face, persevering
  face, downcast face with sweat, tired face, face with bags under eyes, face with spiral eyes, smiling face with
  horns, enraged face, rolling on the floor laughing, face in clouds, expressionless face, anxious face with sweat,
  weary face, woozy face, sneezing face, saluting face, worried face, drooling face, anguished face, grinning face
  with big eyes
people: pregnant woman, pregnant man, pregnant person, breast-feeding, person feeding baby, merman, mermaid, person
  with white cane, people with bunny ears, person in suit levitating, person in steamy room, hairy creature, Mx Claus,
  person getting massage, person in motorized wheelchair, person in manual wheelchair, troll, baby angel
"""

# Kinds that are right as well, beside the first.
ALSO = """
mammal: spouting whale, whale, dolphin, seal
insect: butterfly, bug, ant, honeybee, beetle, lady beetle, cricket, cockroach, mosquito, fly
animal: unicorn, dragon face, dragon
fruit: avocado, eggplant, hot pepper, bell pepper, cucumber
vegetable: tomato, olive, jack-o-lantern
nut: peanuts, chestnut, coconut
plant: leafy green
food: moon cake, dango, fortune cookie, honey pot
sweets: pancakes, waffle
city: night with stars, cityscape, cityscape at dusk, bridge at night
sky object: sunrise, sunset, sunrise over mountains
weather: foggy, umbrella, closed umbrella, umbrella on ground
landscape: fountain, camping, fog
sports equipment: ice skate, roller skate
toy or game: video game, joystick, balloon, bullseye, teddy bear
weapon: dagger, crossed swords, bomb, boomerang, bow and arrow, shield, axe, water pistol, kitchen knife
tool: kitchen knife, scissors, magnet, paintbrush, broom, razor, mouse trap, flashlight
office item: paintbrush, briefcase, bookmark, clipboard, memo, calendar, tear-off calendar, spiral notepad, spiral
  calendar, card index
household item: magnifying glass tilted left, magnifying glass tilted right, ladder, television, radio, electric plug
festive item: balloon, firecracker, Christmas tree, tanabata tree, birthday cake
money: receipt
face: skull, sun with face, full moon face, new moon face, first quarter moon face, last quarter moon face
ship: passenger ship, ferry, ship, sailboat
spacecraft: satellite, rocket, flying saucer
shoe: thong sandal, man’s shoe, running shoe, hiking boot, flat shoe, high-heeled shoe, woman’s sandal, ballet shoes,
  woman’s boot, ice skate, roller skate
hat: crown, woman’s hat, top hat, graduation cap, billed cap, military helmet, rescue worker’s helmet
clock: hourglass done, hourglass not done, alarm clock, mantelpiece clock, three o’clock, stopwatch, timer clock
umbrella: closed umbrella, umbrella, umbrella on ground, umbrella with rain drops
tree: evergreen tree, deciduous tree, palm tree
train: locomotive, high-speed train, bullet train, train, metro, light rail
building: station, camping
"""

# Near-duplicates: pictures of one thing from two sides or in two states, of things that look alike, or with nearly one
# name. A group is in one pool as a whole; an emoji in no group is a group of its own.
GROUPS = """
monkey: monkey face, monkey, orangutan, gorilla
dog: dog face, dog, guide dog, service dog, poodle
cat: cat face, cat, black cat
tiger: tiger face, tiger, leopard
horse: horse face, horse, donkey, unicorn, zebra
cow: cow face, cow, ox, water buffalo, bison
pig: pig face, pig, boar
sheep: ram, ewe, goat
camel: camel, two-hump camel, llama
elephant: elephant, mammoth
mouse: mouse face, mouse, rat, hamster
rabbit: rabbit face, rabbit
bear: bear, polar bear, koala, panda
wolf: wolf, fox
deer: deer, moose
badger: badger, skunk, raccoon, beaver, chipmunk
chicken: chicken, rooster, hatching chick, baby chick, front-facing baby chick
black bird: bird, black bird
duck: duck, goose, swan
dragon: dragon face, dragon
dinosaur: sauropod, T-Rex
whale: spouting whale, whale, dolphin
fish: fish, tropical fish, shark
octopus: octopus, squid
crab: crab, lobster, shrimp, fried shrimp
beetle: beetle, lady beetle, cockroach, cricket, ant, bug
fly: fly, mosquito, honeybee
blossom: cherry blossom, blossom, hibiscus, sunflower
rose: rose, wilted flower
clover: shamrock, four leaf clover, herb
leaf: maple leaf, fallen leaf, leaf fluttering in wind
tree: evergreen tree, deciduous tree, Christmas tree, tanabata tree
seedling: seedling, potted plant
melon: melon, watermelon
citrus: tangerine, lemon
apple: red apple, green apple, tomato, peach, cherries
pepper: hot pepper, bell pepper
bread: bread, baguette bread, croissant
bowl: steaming bowl, cooked rice, curry rice, bowl with spoon, green salad, pot of food
meat: meat on bone, poultry leg
taco: taco, burrito, stuffed flatbread, flatbread
dumpling: dumpling, fortune cookie
rice: rice ball, rice cracker
pan: cooking, shallow pan of food
ice cream: soft ice cream, ice cream, shaved ice
cake: birthday cake, shortcake, cupcake, pie
candy: candy, lollipop
beer: beer mug, clinking beer mugs
wine: wine glass, cocktail glass, tropical drink, clinking glasses
tea: teacup without handle, hot beverage
cup: cup with straw, bubble tea
cutlery: fork and knife with plate, fork and knife, spoon
knife: kitchen knife, dagger
lock: locked, unlocked
key: key, old key
umbrella: closed umbrella, umbrella, umbrella with rain drops, umbrella on ground, beach with umbrella
bell: bell, bellhop bell
lantern: red paper lantern, diya lamp
house: houses, derelict house, house, house with garden, hut
office building: office building, Japanese post office, post office, hospital, bank, hotel, convenience store, school,
  department store
castle: Japanese castle, castle
temple: classical building, hindu temple
mountain: snow-capped mountain, mountain, mount fuji, volcano, sunrise over mountains
tent: camping, tent, circus tent
city: night with stars, cityscape, cityscape at dusk, bridge at night, sunset, foggy, sunrise
train: locomotive, railway car, high-speed train, bullet train, train, metro, light rail, station, tram, monorail,
  mountain railway, tram car, suspension railway
bus: bus, oncoming bus, trolleybus, minibus
police car: police car, oncoming police car
taxi: taxi, oncoming taxi
car: automobile, oncoming automobile, sport utility vehicle, racing car
truck: pickup truck, delivery truck, articulated lorry, ambulance, fire engine
scooter: motorcycle, motor scooter
bicycle: bicycle, kick scooter
ship: passenger ship, ferry, ship
speedboat: speedboat, motor boat
airplane: airplane, small airplane, airplane departure, airplane arrival
hourglass: hourglass done, hourglass not done
clock: mantelpiece clock, three o’clock
moon: new moon, waxing crescent moon, first quarter moon, waxing gibbous moon, full moon, waning gibbous moon, last
  quarter moon, waning crescent moon, crescent moon, new moon face, first quarter moon face, last quarter moon face,
  full moon face
sun: sun, sun with face
star: star, glowing star, shooting star
cloud: cloud, sun behind cloud, cloud with lightning and rain, sun behind small cloud, sun behind large cloud, sun
  behind rain cloud, cloud with rain, cloud with snow, cloud with lightning, fog, wind face
snowman: snowman, snowman without snow
firework: fireworks, sparkler
party: party popper, confetti ball
medal: sports medal, 1st place medal, 2nd place medal, 3rd place medal, military medal
baseball: baseball, softball, tennis
rugby: american football, rugby football
stick: field hockey, ice hockey, lacrosse, cricket game
racket: ping pong, badminton
glasses: glasses, sunglasses, goggles, diving mask
shirt: t-shirt, coat, lab coat, safety vest
dress: dress, sari, kimono
shorts: shorts, briefs, jeans
swimsuit: one-piece swimsuit, bikini
handbag: purse, handbag, clutch bag
luggage: luggage, briefcase
shoe: man’s shoe, running shoe, hiking boot
sandal: thong sandal, woman’s sandal, high-heeled shoe, woman’s boot
flat shoe: flat shoe, ballet shoes
skate: ice skate, roller skate
hat: woman’s hat, top hat
helmet: military helmet, rescue worker’s helmet
horn: trumpet, postal horn, saxophone
guitar: guitar, banjo, violin
drum: drum, long drum
phone: telephone, telephone receiver
computer: laptop, desktop computer
disk: computer disk, floppy disk, optical disk, dvd
camera: camera, video camera, movie camera, film projector
microphone: studio microphone, microphone
magnifier: magnifying glass tilted left, magnifying glass tilted right
book: notebook with decorative cover, closed book, green book, blue book, orange book, books, notebook, ledger
page: page with curl, page facing up, memo, bookmark tabs, clipboard, receipt, calendar, tear-off calendar, spiral
  calendar, spiral notepad
newspaper: newspaper, rolled-up newspaper
chart: chart increasing, chart decreasing, bar chart
pen: pencil, black nib, fountain pen, pen, crayon, paintbrush
folder: file folder, open file folder
pin: pushpin, round pushpin
paperclip: paperclip, linked paperclips
ruler: straight ruler, triangular ruler
file box: card file box, file cabinet
banknote: yen banknote, dollar banknote, euro banknote, pound banknote, money with wings
letter: envelope, love letter
mailbox: closed mailbox with raised flag, closed mailbox with lowered flag, open mailbox with raised flag, open
  mailbox with lowered flag
hammer: hammer, pick, hammer and pick, hammer and wrench, wrench, axe
test tube: alembic, test tube
leg: leg, foot, mechanical leg
arm: flexed biceps, mechanical arm
yarn: yarn, thread
ill: nauseated face, face vomiting
bandage: face with medical mask, face with thermometer, face with head-bandage
glasses on face: smiling face with sunglasses, nerd face, disguised face, face with monocle
Japanese mask: ogre, goblin
baby: baby, child, person, older person
royal: person with crown, prince, princess
Claus: Santa Claus, Mrs. Claus
walk: person walking, person running, person standing, person kneeling, person climbing
swim: person swimming, person playing water polo, person surfing, person rowing boat
bike: person biking, person mountain biking
ball: person bouncing ball, person playing handball, person juggling, person cartwheeling, people wrestling
ski: skier, snowboarder
office worker: student, teacher, office worker, technologist, scientist, health worker, judge, singer, artist, pilot,
  farmer, cook, mechanic, factory worker
guard: police officer, guard, detective, construction worker, firefighter
covered head: person wearing turban, person with skullcap, person with veil, person in tuxedo
fantasy: superhero, supervillain, mage, fairy, vampire, elf, genie, zombie, merperson, ninja
plain face: grinning face, beaming face with smiling eyes, grinning squinting face, grinning face with sweat, face
  with tears of joy, slightly smiling face, smiling face, upside-down face, melting face, smiling face with halo, face
  savoring food, face with tongue, winking face with tongue, zany face, winking face, neutral face, zipper-mouth face,
  unamused face, grimacing face, face with raised eyebrow, confused face, frowning face, pensive face, disappointed
  face, confounded face, face with hand over mouth, shushing face, thinking face, yawning face, sleepy face, sleeping
  face, face with open mouth, astonished face, flushed face, pleading face, fearful face, face screaming in fear,
  angry face, face with steam from nose, face with symbols on mouth, angry face with horns, crying face, loudly crying
  face, face with crossed-out eyes
love: smiling face with hearts, smiling face with heart-eyes, star-struck, face blowing a kiss
toilet: toilet, bathtub
"""


def table(text: str) -> dict[str, tuple[str, ...]]:
    """Returns the entries of one of the tables above: emoji by kind or group."""
    entries = " ".join(line if line[:1] == " " else f"\n{line}" for line in text.splitlines() if line).split("\n")
    pairs = (entry.split(":", 1) for entry in entries if entry)
    return {name: tuple(" ".join(emoji.split()) for emoji in emojis.split(",")) for name, emojis in pairs}


def inverse(text: str) -> dict[str, str]:
    """Returns the kind or group of each emoji of a table in which an emoji has one entry.

    Raises:
        ValueError: an emoji has two entries.
    """
    pairs = [(emoji, name) for name, emojis in table(text).items() for emoji in emojis]
    if len(dict(pairs)) < len(pairs):
        raise ValueError(f"two entries have {next(e for e, n in pairs if dict(pairs)[e] != n)!r}")
    return dict(pairs)
